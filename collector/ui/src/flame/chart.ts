/** Functions on the d3-flame-graph component and the SVG that it draws. They keep no state of their own. */
import flamegraph, { type Chart, type ChartNode, type Tip } from "d3-flame-graph";
import { select } from "d3-selection";
import { points } from "../units";
import { type FrameData, type Frames, MOSTLY_GUESSED, changeColour, groupColour, matchColour } from "./frames";

export type Node = ChartNode<FrameData>;
type Group = SVGGElement & { __data__: Node };
type Host = HTMLElement | null;

/** Height of a row in pixels. */
const ROW_HEIGHT = 20;
/** Minimum width of a frame in pixels. Narrower frames are invisible and too small to hit, so they need a zoom. */
const MIN_WIDTH = 1.2;
/** Maximum number of drawn frames for an animated change. */
const MAX_ANIMATED_FRAMES = 400;

/** Options that the component reads whenever it draws. */
export interface Look {
  frames: Frames;
  diff: boolean;
  dark: boolean;
  blind: boolean;
  flip: boolean;
  search: string;
  matches: (name: string) => boolean;
}

export interface ChartEvents {
  onClick: (node: Node) => void;
  onHover: (node: Node | undefined) => void;
}

function fillOf({ data, highlight }: Pick<Node, "data" | "highlight">, { frames, diff, dark, blind, search }: Look): string {
  if (highlight && search !== "" && !diff) return matchColour(dark);
  return diff ? changeColour(data.delta, dark, blind) : groupColour(frames.hues, data.group, dark, data.name);
}

/** Creates the component in `box`. Its callbacks read `look()` at each call, so the component outlives changes. */
export function createChart(box: HTMLElement, width: number, look: () => Look, events: ChartEvents): Chart<FrameData> {
  const tip: Tip<FrameData> = Object.assign(() => {}, {
    show: (_event: MouseEvent, node: Node) => events.onHover(node),
    hide: () => events.onHover(undefined),
    destroy: () => {},
  });
  const chart = flamegraph<FrameData>()
    .width(width)
    .cellHeight(ROW_HEIGHT)
    .minFrameSize(MIN_WIDTH)
    .transitionDuration(0)
    .inverted(!look().flip)
    .resetHeightOnZoom(true)
    .sort((a, b) => b.data.value - a.data.value || (a.data.name < b.data.name ? -1 : 1))
    .title("")
    .tooltip(tip)
    .getName(({ data }) => (look().diff && Math.abs(data.delta) >= 0.001 ? `${data.name} (${points(data.delta)})` : data.name))
    .getValue((data) => data.value)
    .setSearchMatch((node) => !(node.depth === 0) && look().matches(node.data.name))
    .setSearchHandler(() => {})
    .setDetailsHandler(() => {})
    .setColorMapper((node) => fillOf(node, look()))
    .onClick(events.onClick);
  // Like d3, the component stores its data on the element.
  chart(select(box).datum({ ...look().frames.root, children: [] }));
  return chart;
}

/** Runs an operation that redraws, animated if there are few frames and the reader does not prefer reduced motion. */
export function redraw(chart: Chart<FrameData>, host: Host, operation: (chart: Chart<FrameData>) => void): void {
  const animated = !matchMedia("(prefers-reduced-motion: reduce)").matches && drawnNodes(host).length < MAX_ANIMATED_FRAMES;
  chart.transitionDuration(animated ? 180 : 0);
  operation(chart);
}

export const rootOf = (host: Host): Node | undefined => (host as (HTMLElement & { __data__?: Node }) | null)?.__data__;

export const drawnNodes = (host: Host): Node[] =>
  [...(host?.querySelectorAll<Group>("g.frame") ?? [])].map((group) => group.__data__);

export function findKey(root: Node | undefined, key: string): Node | undefined {
  const open = [root];
  for (let node = open.pop(); node; node = open.pop()) {
    if (node.data.key === key) return node;
    open.push(...(node.children ?? []));
  }
  return undefined;
}

/** Returns the path from the root to the zoomed frame. The component fades the ancestors of that frame. */
export function zoomPath(root: Node): Node[] {
  const path = [root];
  for (let node = root; ; ) {
    const inner = node.data.fade ? node.children?.find((child) => !child.data.hide) : undefined;
    if (!inner) return path;
    path.push(inner);
    node = inner;
  }
}

export interface Found {
  part: number;
  base: number;
  count: number;
}

/** Sums up the frames that match the search. A match below another match adds nothing to the sums. */
export function sumMatches(root: Node): Found {
  const sum: Found = { part: 0, base: 0, count: 0 };
  const open: [Node, boolean][] = [[root, false]];
  for (let next = open.pop(); next; next = open.pop()) {
    const [node, inside] = next;
    if (node.highlight) sum.count += 1;
    if (node.highlight && !inside) {
      sum.part += node.data.total;
      sum.base += node.data.baseTotal;
    }
    for (const child of node.children ?? []) open.push([child, inside || Boolean(node.highlight)]);
  }
  return sum;
}

const SVG = "http://www.w3.org/2000/svg";

/** Adds an element with attributes to another one. */
function append(parent: Element, name: string, attributes: Record<string, string>): Element {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  parent.append(element);
  return element;
}

/** Returns a function from a colour to a hatched fill of that colour. Its patterns replace those of the last call for `svg`. */
function hatching(svg: Element): (colour: string) => string {
  svg.querySelector("defs.hatches")?.remove();
  const defs = append(svg, "defs", { class: "hatches" });
  const made = new Map<string, string>();
  return (colour) => {
    let id = made.get(colour);
    if (id === undefined) {
      id = `hatch-${made.size}`;
      made.set(colour, id);
      const pattern = append(defs, "pattern", { id, width: "7", height: "7", patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" });
      append(pattern, "path", { d: "M0 0H7V7H0Z", fill: colour });
      append(pattern, "path", { d: "M1 0V7", class: "hatch" });
    }
    return `url(#${id})`;
  };
}

/**
 * Sets the classes of the drawn frames for the style sheet and hides the SVG from assistive technology.
 * Returns the number of drawn frames, and whether the frame with the key `current` is one of them.
 */
export function decorate(host: Host, look: Look, current: string): { count: number; hasCurrent: boolean } | undefined {
  const svg = host?.querySelector("svg");
  if (!svg) return undefined;
  svg.setAttribute("aria-hidden", "true");
  const { search, diff } = look;
  const searching = search !== "";
  const hatched = hatching(svg);
  let front: Group | undefined;
  let count = 0;
  for (const group of svg.querySelectorAll<Group>("g.frame")) {
    const node = group.__data__;
    const { data } = node;
    group.classList.toggle("special", data.special && node.depth > 0);
    group.classList.toggle("inlined", data.inlined);
    // The whole graph is no frame that could be wrong.
    const guessed = node.depth > 0 ? data.guessed : 0;
    group.classList.toggle("guessed", guessed >= MOSTLY_GUESSED);
    group.classList.toggle("partly-guessed", guessed > 0 && guessed < MOSTLY_GUESSED);
    const rect = group.querySelector("rect");
    if (rect) rect.style.fill = guessed >= MOSTLY_GUESSED ? hatched(fillOf(node, look)) : "";
    group.classList.toggle("kernel", data.kernel);
    group.classList.toggle("match", searching && Boolean(node.highlight));
    group.classList.toggle("miss", searching && !node.highlight);
    group.classList.toggle("more", diff && data.delta >= 0.001);
    group.classList.toggle("less", diff && data.delta <= -0.001);
    group.classList.toggle("current", data.key === current);
    if (data.key === current) front = group;
    count += 1;
  }
  // The last child is painted on top, so that neighbours do not cover the outline of the current frame.
  if (front) svg.append(front);
  return { count, hasCurrent: front !== undefined };
}
