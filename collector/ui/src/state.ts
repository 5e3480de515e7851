/** The state of the page. The address of the page contains it, so a link shows the same view to another person. */
import { useEffect, useState } from "preact/hooks";
import { spanParameter } from "./spans";

export type View = "profiles" | "nodes" | "rules";
export type Show = "graph" | "both" | "sandwich" | "table" | "list";
export type Theme = "auto" | "light" | "dark";
export type Colour = "package" | "binary" | "kind";
export type Span = [from: number, until: number];

export interface State {
  view: View;
  /** The selector; empty for all profiles. */
  q: string;
  /** The range on the timeline: `now-1h`, `now`, or milliseconds. */
  from: string;
  until: string;
  /** The picked part of that range, if any. */
  span: Span | undefined;
  /** Show the timeline as a heat map. */
  heat: boolean;
  /** The label of the heat map's rows; empty for rows by value. */
  rows: string;
  /** Show the list of captures and changes of rules. */
  events: boolean;
  type: string;
  /** The id of a single profile; empty for all. */
  profile: string;
  compare: boolean;
  /** The selector of the base; `undefined` for the same selector. */
  bq: string | undefined;
  /** How much earlier the range of the base is, in milliseconds. */
  shift: number;
  bspan: Span | undefined;
  /** Show both sides of a comparison beside each other. */
  sides: boolean;
  search: string;
  /** Key of the zoomed frame: see `FrameData.key`. */
  zoom: string;
  show: Show;
  /** The function of the sandwich view, and its file. An empty file means any file. */
  fn: string;
  fnFile: string;
  /** Column and direction of the table: `total`, `-name`; empty for the usual order. */
  sort: string;
  /** Kinds of frames to leave out: `kernel`, `native`, `python`. */
  hide: string[];
  /** A regular expression: only stacks with a frame that matches. */
  only: string;
  /** A regular expression: no stacks with a frame that matches. */
  without: string;
  /** Ids of spans or of traces with `,` between them: only their samples. */
  spans: string;
  colour: Colour;
  /** Show differences in red and green instead of orange and blue. */
  redGreen: boolean;
  /** Compare amounts instead of shares. */
  absolute: boolean;
  /** Draw the root at the bottom. */
  flip: boolean;
  /** Show the native frames of interpreters between the functions that they run. */
  interpreters: boolean;
  /** Leave out frames that say what a stack lacks. */
  hideErrors: boolean;
  live: boolean;
  /** The filter of the nodes. */
  nodes: string;
  /** A colour scheme that the link asks for; `auto` leaves it to the reader's own choice. */
  theme: Theme;
}

export const DEFAULTS: State = {
  view: "profiles",
  q: "",
  from: "now-1h",
  until: "now",
  span: undefined,
  heat: false,
  rows: "",
  events: false,
  type: "",
  profile: "",
  compare: false,
  bq: undefined,
  shift: 0,
  bspan: undefined,
  sides: false,
  search: "",
  zoom: "",
  show: "graph",
  fn: "",
  fnFile: "",
  sort: "",
  hide: [],
  only: "",
  without: "",
  spans: "",
  colour: "package",
  redGreen: false,
  absolute: false,
  flip: false,
  interpreters: false,
  hideErrors: false,
  live: false,
  nodes: "",
  theme: "auto",
};

const oneOf = <T extends string>(text: string | null, allowed: readonly T[], fallback: T): T =>
  allowed.find((entry) => entry === text) ?? fallback;

function span(text: string | null): Span | undefined {
  const found = /^(\d{1,15})-(\d{1,15})$/.exec(text ?? "");
  if (!found) return undefined;
  const [from, until] = [Number(found[1]), Number(found[2])];
  return from < until ? [from, until] : undefined;
}

export function fromAddress(location: { pathname: string; search: string }): State {
  const get = new URLSearchParams(location.search);
  const last = location.pathname.split("/").pop() ?? "";
  return {
    view: oneOf(last, ["nodes", "rules"] as const, "profiles" as never) as View,
    q: get.get("q") ?? "",
    from: get.get("from") || DEFAULTS.from,
    until: get.get("until") || DEFAULTS.until,
    span: span(get.get("span")),
    heat: get.get("time") === "heat",
    rows: get.get("rows") ?? "",
    events: get.has("events"),
    type: get.get("type") ?? "",
    profile: get.get("profile") ?? "",
    compare: get.has("compare"),
    bq: get.get("base") ?? undefined,
    shift: Math.max(0, Number(get.get("shift")) || 0),
    bspan: span(get.get("base_span")),
    sides: get.has("sides"),
    search: get.get("search") ?? "",
    zoom: get.get("zoom") ?? "",
    show: oneOf(get.get("show"), ["graph", "both", "sandwich", "table", "list"], DEFAULTS.show),
    fn: get.get("function") ?? "",
    fnFile: get.get("function_file") ?? "",
    sort: get.get("sort") ?? "",
    hide: [...new Set((get.get("hide") ?? "").split(",").filter((kind) => kind !== ""))],
    only: get.get("only") ?? "",
    without: get.get("without") ?? "",
    // A span belongs to one trace, so a link with both asks for the span.
    spans: get.get("span_id") || get.get("trace_id") || "",
    colour: oneOf(get.get("colour"), ["package", "binary", "kind"], DEFAULTS.colour),
    redGreen: get.has("red_green"),
    absolute: get.has("absolute"),
    flip: get.has("flip"),
    interpreters: get.has("interpreters"),
    hideErrors: get.has("hide_errors"),
    live: get.has("live"),
    nodes: get.get("nodes") ?? "",
    theme: oneOf(get.get("theme"), ["auto", "light", "dark"], DEFAULTS.theme),
  };
}

export function toAddress(state: State): string {
  const search = new URLSearchParams();
  const set = (name: string, value: string | undefined, fallback = "") => {
    if (value !== undefined && value !== fallback) search.set(name, value);
  };
  const flag = (name: string, on: boolean) => set(name, on ? "1" : "");
  set("q", state.q);
  set("from", state.from, DEFAULTS.from);
  set("until", state.until, DEFAULTS.until);
  set("span", state.span?.join("-"));
  set("time", state.heat ? "heat" : "");
  set("rows", state.rows);
  flag("events", state.events);
  set("type", state.type);
  set("profile", state.profile);
  flag("compare", state.compare);
  if (state.bq !== undefined) search.set("base", state.bq);
  set("shift", String(state.shift), "0");
  set("base_span", state.bspan?.join("-"));
  flag("sides", state.sides);
  set("search", state.search);
  set("zoom", state.zoom);
  set("show", state.show, DEFAULTS.show);
  set("function", state.fn);
  set("function_file", state.fnFile);
  set("sort", state.sort);
  set("hide", state.hide.join(","));
  set("only", state.only);
  set("without", state.without);
  set(spanParameter(state.spans), state.spans);
  set("colour", state.colour, DEFAULTS.colour);
  flag("red_green", state.redGreen);
  flag("absolute", state.absolute);
  flag("flip", state.flip);
  flag("interpreters", state.interpreters);
  flag("hide_errors", state.hideErrors);
  flag("live", state.live);
  set("nodes", state.nodes);
  set("theme", state.theme, DEFAULTS.theme);
  const text = search.toString();
  return `./${state.view === "profiles" ? "" : state.view}${text ? `?${text}` : ""}`;
}

let current = fromAddress(location);
const listeners = new Set<(state: State) => void>();

/** Changes the state. A small change, such as a typed letter, replaces the entry in the history; others add one. */
export function go(change: Partial<State>, small = false): void {
  const next = { ...current, ...change };
  const address = toAddress(next);
  if (address !== toAddress(current)) history[small ? "replaceState" : "pushState"](null, "", address);
  current = next;
  for (const listener of listeners) listener(current);
}

addEventListener("popstate", () => {
  current = fromAddress(location);
  for (const listener of listeners) listener(current);
});

export function useAddress(): State {
  const [state, set] = useState(current);
  useEffect(() => {
    listeners.add(set);
    set(current);
    return () => void listeners.delete(set);
  }, []);
  return state;
}
