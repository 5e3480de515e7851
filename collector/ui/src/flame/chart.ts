/** Functions on the d3-flame-graph component and the SVG that it draws. They keep no state of their own. */
import flamegraph, { type Chart, type ChartNode, type Tip } from "d3-flame-graph";
import { select } from "d3-selection";
import { points } from "../units";
import { type FrameData, type Frames, changeColour, groupColour, matchColour } from "./frames";

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
    .setColorMapper(({ data, highlight }) => {
      const { frames, diff, dark, blind, search } = look();
      if (highlight && search !== "" && !diff) return matchColour(dark);
      return diff ? changeColour(data.delta, dark, blind) : groupColour(frames.hues, data.group, dark, data.name);
    })
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

/**
 * Sets the classes of the drawn frames for the style sheet and hides the SVG from assistive technology.
 * Returns the number of drawn frames, and whether the frame with the key `current` is one of them.
 */
export function decorate(host: Host, { search, diff }: Look, current: string): { count: number; hasCurrent: boolean } | undefined {
  const svg = host?.querySelector("svg");
  if (!svg) return undefined;
  svg.setAttribute("aria-hidden", "true");
  const searching = search !== "";
  let front: Group | undefined;
  let count = 0;
  for (const group of svg.querySelectorAll<Group>("g.frame")) {
    const node = group.__data__;
    const { data } = node;
    group.classList.toggle("special", data.special && node.depth > 0);
    group.classList.toggle("inlined", data.inlined);
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
