/** The answers of the collector for the selections: sample types, timelines, the flame graph, the table of functions. */
import { useMemo } from "preact/hooks";
import {
  type Annotations,
  type ApiError,
  type HeatMap,
  type Selection,
  type Series,
  type Timeline,
  type Top,
  baseParameters,
  get,
  selectionParameters,
} from "../api";
import { filtered } from "../flame/filter";
import { type Frames, frames } from "../flame/frames";
import { type LoadedGraph, loadGraph } from "../flame/loadGraph";
import { type Matches, matchNames } from "../flame/matches";
import { unpack } from "../flame/packed";
import { topOf } from "../flame/top";
import type { Tree } from "../flame/tree";
import { type Load, useLoad } from "../parts/hooks";
import { type Sliced, useSliced } from "../parts/sliced";
import { mistakeInSpans, spanParameters } from "../spans";
import type { State } from "../state";
import { niceStep } from "../time";
import type { Selections } from "./selection";

const MAX_NODES = 100_000;
const MAX_FUNCTIONS = 2000;

/** Order of the known sample types in the menu; others follow by name. */
const TYPE_ORDER = ["cpu/nanoseconds", "samples/count", "offcpu/nanoseconds", "events/count"];

/** An answer, and whether its request had a base. Another request may have one already. */
type Compared<T> = T & { compared: boolean };

export type ComparedTop = Compared<Top>;

/** A graph, and whether its request named spans. */
type Graph = Compared<LoadedGraph> & { ofSpans: boolean };

export interface Answers {
  types: string[];
  /** The shown sample type; empty until the types are known. */
  type: string;
  line: Timeline | undefined;
  baseLine: Timeline | undefined;
  heat: HeatMap | undefined;
  baseHeat: HeatMap | undefined;
  /** Captures of the selection and changes of rules. */
  events: Annotations | undefined;
  /** Names of labels that the rows of a heat map can show. */
  labels: string[];
  graph: LoadedGraph | undefined;
  /** The nodes of the graph before the filters. */
  tree: Tree | undefined;
  /** Mistakes in the filters. A wrong one filters nothing. */
  mistakes: string[];
  /** The graph after the filters, prepared for drawing. */
  drawn: Frames | undefined;
  top: Load<ComparedTop>;
  total: number;
  baseTotal: number;
  /** True if the graph compares two selections. */
  diff: boolean;
  /** True if the selections have no samples, also in other spans. */
  isEmpty: boolean;
  busy: boolean;
  /** A mistake in the selector. */
  queryError: ApiError | undefined;
  /** True if that mistake is in the selector of the base. */
  isBaseError: boolean;
  /** Any other failure. */
  failure: ApiError | undefined;
}

interface Shown {
  graph: Graph;
  tree: Tree;
}

function* withTree(graph: Graph): Sliced<Shown> {
  return { graph, tree: yield* unpack(graph.packed) };
}

type Filters = Pick<State, "hide" | "only" | "without">;

const isActive = ({ hide, only, without }: Filters) => hide.length > 0 || only !== "" || without !== "";

/** Applies the filters of the address. A wrong pattern filters nothing. */
function* withFilter({ graph, tree }: Shown, { hide, only, without }: Filters): Sliced<Shown & { mistakes: string[] }> {
  const [kept, refused] = [
    only === "" ? undefined : yield* matchNames(tree.names, { pattern: only }),
    without === "" ? undefined : yield* matchNames(tree.names, { pattern: without }),
  ];
  const right = (found: Matches | undefined) => (found?.error === undefined ? found?.matches : undefined);
  const filter = { hidden: hide, only: right(kept), without: right(refused) };
  const mistakes = new Set([kept, refused].flatMap((found) => found?.error ?? []));
  return { graph, tree: hide.length > 0 || filter.only || filter.without ? yield* filtered(tree, filter) : tree, mistakes: [...mistakes] };
}

function* withRows({ graph, tree }: Shown): Sliced<ComparedTop> {
  const { unit, sample_type, total = 0, base_total = 0, compared } = graph;
  return { unit, sample_type, total, base_total, compared, rows: yield* topOf(tree) };
}

/** The tree of an answer, the same after the filters, and that prepared for drawing. */
function useDrawn(graph: Graph | undefined, state: State) {
  const { colour, absolute, hide, only, without } = state;
  const tree = useSliced<Shown>(() => (graph ? withTree(graph) : undefined), [graph]);
  const kept = useSliced(() => tree.value && withFilter(tree.value, state), [tree.value, hide.join(), only, without]);
  const drawn = useSliced<Frames>(() => {
    if (!kept.value) return undefined;
    const { graph: { unit, total = 0, base_total: baseTotal = 0, compared }, tree: of } = kept.value;
    return frames(of, { unit, total, baseTotal, diff: compared, colour, absolute });
  }, [kept.value, colour, absolute]);
  return { tree, kept, drawn };
}

export function useAnswers(state: State, selections: Selections): Answers {
  const { badTime, window, baseWindow, selection, base } = selections;
  const series = useLoad<{ series?: Series[] }>(JSON.stringify(["series", window]), (signal) => get("series", selectionParameters(window), signal));
  const types = useMemo(() => {
    const all = new Set((series.data?.series ?? []).flatMap((entry) => entry.sample_types));
    const rank = (type: string) => (TYPE_ORDER.indexOf(type) + 99) % 99;
    return [...all].sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
  }, [series.data]);
  const type = state.type || types[0] || "";
  // The collector would choose a type itself, perhaps another one, so requests wait until the types are known.
  const ready = state.type !== "" || series.data !== undefined;

  const spanMistake = mistakeInSpans(state.spans);
  const ofSpans = state.spans !== "" && spanMistake === undefined;
  const spans = spanParameters(state.spans);

  const lineKey = (which: Selection) => (ready ? JSON.stringify(["timeline", which, type, spans]) : undefined);
  const loadLine = (which: Selection) => (signal: AbortSignal) =>
    get<Timeline>("timeline", { ...selectionParameters(which), ...spans, type, step_ms: niceStep(which.until - which.from) }, signal);
  const line = useLoad<Timeline>(state.heat ? undefined : lineKey(window), loadLine(window));
  const baseLine = useLoad<Timeline>(state.compare && !state.heat ? lineKey(baseWindow) : undefined, loadLine(baseWindow));
  const heatKey = (which: Selection) => (ready && type && state.heat ? JSON.stringify(["heatmap", which, type, state.rows, spans]) : undefined);
  const loadHeat = (which: Selection) => (signal: AbortSignal) =>
    get<HeatMap>("heatmap", { ...selectionParameters(which), ...spans, type, step_ms: niceStep(which.until - which.from), by: state.rows }, signal);
  const heat = useLoad<HeatMap>(heatKey(window), loadHeat(window));
  const baseHeat = useLoad<HeatMap>(state.compare ? heatKey(baseWindow) : undefined, loadHeat(baseWindow));
  const events = useLoad<Annotations>(JSON.stringify(["annotations", window]), (signal) => get("annotations", selectionParameters(window), signal));
  const labels = useMemo(() => [...new Set((series.data?.series ?? []).flatMap((entry) => Object.keys(entry.labels)))].sort(), [series.data]);

  const request = { ...selectionParameters(selection), ...baseParameters(base), ...spans, profile_id: state.profile, type, interpreter_frames: state.interpreters ? "true" : "", hide_error_frames: state.hideErrors ? "true" : "" };
  const key = ready ? JSON.stringify(request) : undefined;
  const wantsTable = state.show === "table" || state.show === "both" || state.show === "sandwich";
  const graph = useLoad<Graph>(key && `graph ${key}`, async (signal) => ({
    ...(await loadGraph({ ...request, max_nodes: MAX_NODES }, signal)),
    compared: base !== undefined,
    ofSpans,
  }));
  const { tree, kept, drawn } = useDrawn(graph.data, state);
  const isFiltered = isActive(state);
  // The table of the collector knows no filters of the page.
  const rows = useSliced<ComparedTop>(() => (isFiltered && wantsTable && kept.value ? withRows(kept.value) : undefined), [isFiltered, wantsTable, kept.value]);
  const top = useLoad<ComparedTop>(wantsTable && !isFiltered && key ? `top ${key}` : undefined, async (signal) => ({
    ...(await get<Top>("top", { ...request, limit: MAX_FUNCTIONS }, signal)),
    compared: base !== undefined,
  }));

  const total = graph.data?.total ?? 0;
  const baseTotal = graph.data?.base_total ?? 0;
  const hasProfiles = (graph.data?.profiles ?? 0) + (graph.data?.base_profiles ?? 0) > 0;
  const queryError = badTime ? undefined : [series.error, graph.error].find((error) => error?.status === 400);
  // With a wrong selector every request fails, and with an unreachable collector too. One message is enough.
  const loads = [graph, line, baseLine, heat, baseHeat, series, events];
  return {
    types,
    type,
    line: line.data,
    baseLine: baseLine.data,
    heat: heat.data,
    baseHeat: baseHeat.data,
    events: events.data,
    labels,
    graph: graph.data,
    tree: tree.value?.tree,
    mistakes: [...(spanMistake === undefined ? [] : [spanMistake]), ...(kept.value?.mistakes ?? [])],
    drawn: drawn.value,
    top: isFiltered ? (rows.value ? { data: rows.value, loading: rows.busy } : { loading: true }) : top,
    total,
    baseTotal,
    diff: graph.data?.compared ?? false,
    isEmpty: graph.data !== undefined && total === 0 && baseTotal === 0 && !(graph.data.ofSpans && hasProfiles),
    busy: loads.some(({ loading }) => loading) || tree.busy || kept.busy || drawn.busy,
    queryError,
    isBaseError: queryError !== undefined && /base/.test(queryError.message) && state.compare,
    failure: badTime ? undefined : loads.map(({ error }) => error).find((error) => error && !(queryError && error.status === 400)),
  };
}
