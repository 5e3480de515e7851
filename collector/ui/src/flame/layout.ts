/** The frames that are wide enough to see, and their places. */
import type { FrameData, Frames } from "./frames";
import type { FrameName } from "./tree";

/** Minimum width of a frame in pixels. Narrower frames are invisible and too small to hit, so they need a zoom. */
const MIN_WIDTH = 1.2;

/** Frames that are drawn, at most: the browser needs about a kilobyte for each. Deeper rows need a zoom then. */
const MAX_DRAWN = 8000;

/** One frame on the screen. */
export interface Node {
  index: number;
  data: FrameData;
  depth: number;
  /** Left and right edge, as parts of the whole width. */
  x0: number;
  x1: number;
  parent: Node | undefined;
  /** True if the frame matches the search. */
  highlight: boolean;
  /** True for the frames around the zoomed one, which fill the whole width. */
  fade: boolean;
}

export interface LayoutOptions {
  /** The zoomed node; 0 for the whole graph. */
  zoom: number;
  /** Width of the graph in pixels. */
  width: number;
  /** The part of the width that the zoomed node fills. */
  fraction: number;
  /** Values to draw, for instance those of one side of a comparison. The order is always that of the frames' own values. */
  value: Float64Array;
  /** Which of the tree's names match the search. */
  matches: boolean[] | undefined;
}

/** Returns the visible frames row by row, so its time depends on the screen more than on the graph. */
export function layout(frames: Frames, { zoom, width, fraction, value, matches }: LayoutOptions): Node[] {
  const { tree } = frames;
  const nodes: Node[] = [];
  const add = (index: number, depth: number, x0: number, x1: number, parent: Node | undefined, fade: boolean): Node => {
    const node: Node = { index, data: frames.data(index), depth, x0, x1, parent, fade, highlight: depth > 0 && matches?.[tree.frame[index] as number] === true };
    nodes.push(node);
    return node;
  };
  const path: number[] = [];
  for (let at = zoom; at >= 0; at = tree.parent[at] as number) path.unshift(at);
  let last: Node | undefined;
  for (const [depth, index] of path.entries()) last = add(index, depth, 0, fraction, last, index !== zoom);
  const scale = (value[zoom] as number) > 0 ? fraction / (value[zoom] as number) : 0;
  const order = frames.value;
  const name = (index: number) => (tree.names[tree.frame[index] as number] as FrameName).name;
  for (let at = nodes.length - 1; at < nodes.length && nodes.length < MAX_DRAWN; at += 1) {
    const node = nodes[at] as Node;
    const children: number[] = [];
    for (let child = node.index + 1; child < (tree.end[node.index] as number); child = tree.end[child] as number) {
      // All narrower children stand to the right of the visible ones, unless widths and order come from different values.
      if (order !== value || (value[child] as number) * scale * width >= MIN_WIDTH) children.push(child);
    }
    children.sort((a, b) => (order[b] as number) - (order[a] as number) || (name(a) < name(b) ? -1 : 1));
    let left = node.x0;
    for (const child of children) {
      const right = left + (value[child] as number) * scale;
      if ((right - left) * width >= MIN_WIDTH) add(child, node.depth + 1, left, right, node, false);
      left = right;
    }
  }
  return nodes;
}

export interface Found {
  part: number;
  base: number;
  count: number;
}

/** Sums up the nodes that match the search. A match below another match adds nothing to the sums. */
export function sumMatches({ tree }: Frames, matches: boolean[]): Found {
  const sum: Found = { part: 0, base: 0, count: 0 };
  let outside = 0;
  for (let at = 1; at < tree.frame.length; at += 1) {
    if (!matches[tree.frame[at] as number]) continue;
    sum.count += 1;
    if (at < outside) continue;
    outside = tree.end[at] as number;
    sum.part += tree.total[at] as number;
    sum.base += tree.baseTotal[at] as number;
  }
  return sum;
}
