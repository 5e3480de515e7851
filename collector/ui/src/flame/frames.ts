/** A tree, prepared for drawing: widths, groups, colours, keys. */
import type { Colour } from "../state";
import type { Sliced } from "../parts/sliced";
import { groupOf } from "./kinds";
import { type FrameName, NODES_OF_STEP, type Tree } from "./tree";

/** Everything that is shown of one node. */
export interface FrameData extends FrameName {
  total: number;
  self: number;
  baseTotal: number;
  baseSelf: number;
  /** The share of the samples, of both sides, in which the frame was found by a guess or rests on one. */
  guessed: number;
  group: string;
  /** Identifies the path from the root to this frame. It is the same in other ranges, for links and refreshes. */
  key: string;
  /** The share in the comparison minus the share in the base. */
  delta: number;
}

export interface Frames {
  tree: Tree;
  unit: string;
  total: number;
  baseTotal: number;
  /** True if the graph compares two selections. */
  diff: boolean;
  count: number;
  /** The value that the width of each node shows. */
  value: Float64Array;
  /** Groups by their self value, largest first. */
  groups: { name: string; self: number }[];
  /** The hue of each group. */
  hues: Map<string, number>;
  /** Values of each node on one side of a comparison: shares, or amounts if those are compared. */
  side: (side: "base" | "comparison") => Float64Array;
  /** Returns what is shown of a node. */
  data: (node: number) => FrameData;
  /** Returns the node with this key, or -1. */
  find: (key: string) => number;
}

/** Hashes a text with FNV-1a, for keys and hues. */
function hash(text: string, seed = 0x811c9dc5): number {
  let state = seed;
  for (let at = 0; at < text.length; at += 1) {
    state = Math.imul(state ^ text.charCodeAt(at), 0x01000193) >>> 0;
  }
  return state;
}

/** Mixes the hash of a frame into that of its parent's path. */
function mix(path: number, frame: number): number {
  let state = Math.imul(path ^ frame, 0x85ebca6b);
  state = Math.imul(state ^ (state >>> 15), 0xc2b2ae35);
  return (state ^ (state >>> 13)) >>> 0;
}

export interface FramesOptions {
  unit: string;
  /** Totals of both sides, of which shares are parts. A filter or a part of the graph does not change them. */
  total: number;
  baseTotal: number;
  diff: boolean;
  colour: Colour;
  /** Compare amounts instead of shares. */
  absolute: boolean;
  /** Distinguishes the keys of several graphs on one page; empty for the main one. */
  part?: string;
  /** Colours of another graph on the page; by default this graph spreads its own. */
  hues?: Map<string, number>;
}

/** Prepares a tree for drawing. */
export function* frames(tree: Tree, options: FramesOptions): Sliced<Frames> {
  const { unit, total, baseTotal, diff, colour, absolute, part = "" } = options;
  const count = tree.frame.length;
  const shareOf = (amount: number, whole: number) => (whole > 0 ? amount / whole : 0);
  const groupNames: string[] = [];
  const hashes: [Int32Array, Int32Array] = [new Int32Array(tree.names.length), new Int32Array(tree.names.length)];
  for (let at = 0; at < tree.names.length; at += 1) {
    if (at % NODES_OF_STEP === 0) yield;
    const frame = tree.names[at] as FrameName;
    groupNames.push(groupOf(frame, colour));
    const text = `${frame.name}/${frame.file}/${frame.kernel}/${frame.inlined}`;
    hashes[0][at] = hash(text);
    hashes[1][at] = hash(text, 0x9747b28c);
  }
  // The width of a comparison shows both sides, so that new and removed functions are visible.
  const width = (amount: number, baseAmount: number) =>
    !diff ? amount : absolute ? amount + baseAmount : shareOf(amount, total) + shareOf(baseAmount, baseTotal);
  const value = new Float64Array(count);
  // Two hashes of 32 bits. With one, two of 20,000 frames would have the same key now and then.
  const keys: [Uint32Array, Uint32Array] = [new Uint32Array(count), new Uint32Array(count)];
  const groups = new Map<string, number>();
  for (let at = 0; at < count; at += 1) {
    if (at % NODES_OF_STEP === 0) yield;
    const parent = tree.parent[at] as number;
    const frame = tree.frame[at] as number;
    value[at] = width(tree.total[at] as number, tree.baseTotal[at] as number);
    for (const side of [0, 1] as const) keys[side][at] = mix(parent < 0 ? hash(part) : (keys[side][parent] as number), hashes[side][frame] as number);
    if (parent < 0) continue;
    // A special frame with children has no self value, so its total counts.
    const whole = (tree.names[frame] as FrameName).special && (tree.end[at] as number) > at + 1;
    const weight = whole ? (tree.total[at] as number) + (tree.baseTotal[at] as number) : (tree.self[at] as number) + (tree.baseSelf[at] as number);
    const group = groupNames[frame] as string;
    groups.set(group, (groups.get(group) ?? 0) + weight);
  }
  const sideOf = (amounts: Float64Array, whole: number) => (absolute ? amounts : amounts.map((amount) => shareOf(amount, whole)));
  let [ofBase, ofComparison]: (Float64Array | undefined)[] = [];
  const key = (node: number) => (keys[0][node] as number).toString(36) + "-" + (keys[1][node] as number).toString(36);
  const ranked = [...groups].map(([name, self]) => ({ name, self })).sort((a, b) => b.self - a.self);
  return {
    tree,
    unit,
    total,
    baseTotal,
    diff,
    count,
    value,
    groups: ranked,
    hues: options.hues ?? spread(ranked.map(({ name }) => name)),
    side: (side) => (side === "base" ? (ofBase ??= sideOf(tree.baseTotal, baseTotal)) : (ofComparison ??= sideOf(tree.total, total))),
    data: (node) => {
      const [amount, baseAmount] = [tree.total[node] as number, tree.baseTotal[node] as number];
      const isWhole = node === 0 && part === "";
      const frame = tree.names[tree.frame[node] as number] as FrameName;
      return {
        ...frame,
        special: frame.special || isWhole,
        total: amount,
        self: tree.self[node] as number,
        baseTotal: baseAmount,
        baseSelf: tree.baseSelf[node] as number,
        guessed: shareOf(tree.guessed[node] as number, amount + baseAmount),
        group: isWhole ? "not a function" : (groupNames[tree.frame[node] as number] as string),
        key: key(node),
        delta: !diff ? 0 : absolute ? shareOf(amount - baseAmount, Math.max(total, baseTotal)) : shareOf(amount, total) - shareOf(baseAmount, baseTotal),
      };
    },
    find: (wanted) => {
      const [high, low] = wanted.split("-").map((text) => Number.parseInt(text, 36));
      for (let at = 0; at < count; at += 1) if (keys[0][at] === high && keys[1][at] === low) return at;
      return -1;
    },
  };
}

/** Hues that differ from each other and from that of the kernel, 255. Most are warm. */
const HUES = [40, 155, 75, 352, 125, 185, 312, 20, 98, 212, 334, 57];

/** Gives each group a hue by its name, so that it is the same in every graph. If a heavier group has that hue, the next free one. */
function spread(names: string[]): Map<string, number> {
  const taken = new Set<number>();
  const hues = new Map<string, number>();
  for (const name of names) {
    let at = hash(name) % HUES.length;
    if (taken.size < HUES.length) while (taken.has(at)) at = (at + 5) % HUES.length;
    taken.add(at);
    hues.set(name, HUES[at] ?? 35);
  }
  return hues;
}

/** Frames with at least this share of guesses are hatched; those with a smaller one have a dotted outline. */
export const MOSTLY_GUESSED = 0.5;

const oklch = (lightness: number, chroma: number, hue: number) =>
  `oklch(${lightness.toFixed(3)} ${chroma.toFixed(3)} ${hue})`;

export function groupColour(hues: Map<string, number>, group: string, dark: boolean, name = group): string {
  // Small differences in lightness within a group separate neighbours.
  const shade = ((hash(name) >>> 8) % 5) * 0.012;
  const light = dark ? 0.43 + shade : 0.8 + shade;
  if (group === "not a function") return oklch(dark ? 0.36 : 0.88, 0.004, 250);
  if (group === "kernel") return oklch(light, dark ? 0.055 : 0.06, 255);
  if (group === "native") return oklch(light, 0.095, 55);
  if (group === "python") return oklch(light, 0.1, 155);
  if (group === "java") return oklch(light, 0.1, 20);
  if (group === "javascript") return oklch(light, 0.1, 185);
  if (group === "native, inlined") return oklch(light, 0.085, 100);
  // The modules of a group have slightly different hues.
  const lean = ((hash(name.replace(/::[^:]*$/, "")) >>> 12) % 5) - 2;
  return oklch(light, dark ? 0.085 : 0.1, (360 + (hues.get(group) ?? 35) + (name === group ? 0 : lean * 6)) % 360);
}

export const matchColour = (dark: boolean) => oklch(dark ? 0.5 : 0.78, dark ? 0.19 : 0.16, 325);

/** Returns orange (or red) for more in the comparison and blue (or green) for less. The square root of the change sets the strength. */
export function changeColour(delta: number, dark: boolean, redGreen: boolean): string {
  const strength = Math.min(1, Math.sqrt(Math.abs(delta)) * 2.2);
  if (Math.abs(delta) < 0.001) return oklch(dark ? 0.37 : 0.9, 0.004, 250);
  const hue = delta > 0 ? (redGreen ? 25 : 60) : redGreen ? 150 : 250;
  const chroma = 0.03 + strength * (dark ? 0.13 : 0.14);
  return oklch(dark ? 0.4 + strength * 0.08 : 0.9 - strength * 0.14, chroma, hue);
}
