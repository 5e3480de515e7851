/** Frames as the graph draws them, and the colours they get. */
import type { FlameGraph, FlameNode } from "../api";
import type { Colour } from "../state";

export interface FrameData {
  name: string;
  file: string;
  total: number;
  self: number;
  baseTotal: number;
  baseSelf: number;
  kernel: boolean;
  inlined: boolean;
  /** Not a function: `[truncated]`, `[unknown]`, `[other]`. */
  special: boolean;
  group: string;
  /** Names the path from the root to here, the same in another range: for links and across refreshes. */
  key: string;
  /** What the width stands for. */
  value: number;
  /** The share in the comparison less the share in the base. */
  delta: number;
  children: FrameData[];
}

export interface Frames {
  root: FrameData;
  unit: string;
  total: number;
  baseTotal: number;
  count: number;
  /** Heaviest first, by what they did themselves. */
  groups: { name: string; self: number }[];
  /** Which hue each group got. */
  hues: Map<string, number>;
}

/** FNV-1a, for keys and hues: not for secrets. */
function hash(text: string, seed = 0x811c9dc5): number {
  let state = seed;
  for (let at = 0; at < text.length; at += 1) {
    state = Math.imul(state ^ text.charCodeAt(at), 0x01000193) >>> 0;
  }
  return state;
}

/** Twice 32 bits: with twenty thousand frames, half of that would make two of them the same every now and then. */
const keyOf = (path: string) => hash(path).toString(36) + hash(path, 0x9747b28c).toString(36);

const isSpecial = (name: string) => /^\[[^\]]*\]$/.test(name);

/** Where a function comes from: its crate, package or namespace where the name tells, else its binary. */
export function packageOf(name: string, file: string): string {
  const bare = name.replace(/^<+(?:&|mut |dyn |\*const |\*mut )*/, "");
  const scoped = /^([A-Za-z_~][\w.$-]*?)(?:\[[0-9a-f]+\])?(?:<[^:]*>)?::/.exec(bare);
  if (scoped?.[1]) return scoped[1];
  const dotted = /^((?:[\w.~-]+\/)+[\w~-]+|[a-z][\w]*)\.[(*\w]/.exec(name);
  // `memcpy.part.0` and the like are no packages: a compiler's suffix starts with a word of its own.
  if (dotted?.[1] && !/\.(?:part|constprop|isra|cold|llvm|lto_priv)\b/.test(name)) return dotted[1];
  return file || "[unknown]";
}

export function groupOf(frame: FrameData, colour: Colour): string {
  if (frame.special) return "not a function";
  if (colour === "kind") return frame.kernel ? "kernel" : frame.inlined ? "user, inlined" : "user";
  if (frame.kernel) return "kernel";
  return colour === "binary" ? frame.file || "[unknown]" : packageOf(frame.name, frame.file);
}

/** Takes an answer of the collector as it is drawn. It walks with its own stack, as deep as the graph may be. */
export function frames(graph: FlameGraph, colour: Colour, absolute: boolean): Frames {
  const total = graph.total ?? 0;
  const baseTotal = graph.base_total ?? 0;
  const diff = baseTotal > 0 || graph.base_profiles !== undefined;
  const groups = new Map<string, number>();
  const shareOf = (part: number, whole: number) => (whole > 0 ? part / whole : 0);
  // What is cut off has no values of its own but stands for all that lies below it.
  const weight = (frame: FrameData) =>
    frame === root ? 0 : frame.special && frame.children.length > 0 ? frame.total + frame.baseTotal : frame.self + frame.baseSelf;
  let count = 0;
  const make = (node: FlameNode, parent: string): FrameData => {
    count += 1;
    const [amount, baseAmount] = [node.total ?? 0, node.base_total ?? 0];
    const [own, ownBase] = [shareOf(amount, total), shareOf(baseAmount, baseTotal)];
    const frame: FrameData = {
      name: node.name,
      file: node.file ?? "",
      total: amount,
      self: node.self ?? 0,
      baseTotal: baseAmount,
      baseSelf: node.base_self ?? 0,
      kernel: node.kernel ?? false,
      inlined: node.inlined ?? false,
      special: isSpecial(node.name),
      group: "",
      key: keyOf(`${parent}/${node.name}/${node.file ?? ""}/${node.kernel ?? false}/${node.inlined ?? false}`),
      // With both sides in the width, neither what is new nor what is gone vanishes. Shares are scaled, since the
      // component takes off what the children sum up to and would be left with rounding errors of small fractions.
      value: !diff ? amount : absolute ? amount + baseAmount : Math.round((own + ownBase) * 1e12),
      delta: diff ? (absolute ? shareOf(amount - baseAmount, Math.max(total, baseTotal)) : own - ownBase) : 0,
      children: [],
    };
    frame.group = groupOf(frame, colour);
    return frame;
  };
  const from: FlameNode = graph.root ?? { name: "all" };
  const root = make({ ...from, name: "all" }, "");
  root.special = true;
  root.group = groupOf(root, colour);
  const open: [FlameNode, FrameData][] = [[from, root]];
  for (let next = open.pop(); next; next = open.pop()) {
    const [node, frame] = next;
    for (const child of node.children ?? []) {
      const made = make(child, frame.key);
      frame.children.push(made);
      open.push([child, made]);
    }
    groups.set(frame.group, (groups.get(frame.group) ?? 0) + weight(frame));
    if (diff) {
      // Rounding must not make a parent narrower than its children.
      const inner = frame.children.reduce((sum, child) => sum + child.value, 0);
      frame.value = Math.max(frame.value, inner);
    }
  }
  const ranked = [...groups].map(([name, self]) => ({ name, self })).sort((a, b) => b.self - a.self);
  return { root, unit: graph.unit, total, baseTotal, count, groups: ranked, hues: spread(ranked.map(({ name }) => name)) };
}

/** Apart from each other and from the kernel's 255; the warm ones are the more. */
const HUES = [40, 155, 75, 352, 125, 185, 312, 20, 98, 212, 334, 57];

/** A name keeps its hue from one graph to the next, unless a heavier group has it: then it moves on to a free one. */
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

const oklch = (lightness: number, chroma: number, hue: number) =>
  `oklch(${lightness.toFixed(3)} ${chroma.toFixed(3)} ${hue})`;

export function groupColour(hues: Map<string, number>, group: string, dark: boolean, name = group): string {
  // A little light and shade within a group keeps neighbours apart.
  const shade = ((hash(name) >>> 8) % 5) * 0.012;
  const light = dark ? 0.43 + shade : 0.8 + shade;
  if (group === "not a function") return oklch(dark ? 0.36 : 0.88, 0.004, 250);
  if (group === "kernel") return oklch(light, dark ? 0.055 : 0.06, 255);
  if (group === "user") return oklch(light, 0.095, 55);
  if (group === "user, inlined") return oklch(light, 0.085, 100);
  // The modules of a group lean a little to one side or the other.
  const lean = ((hash(name.replace(/::[^:]*$/, "")) >>> 12) % 5) - 2;
  return oklch(light, dark ? 0.085 : 0.1, (360 + (hues.get(group) ?? 35) + (name === group ? 0 : lean * 6)) % 360);
}

export const matchColour = (dark: boolean) => oklch(dark ? 0.5 : 0.78, dark ? 0.19 : 0.16, 325);

/** More in the comparison is red (or orange), less is green (or blue); the root of the share sets the strength. */
export function changeColour(delta: number, dark: boolean, blind: boolean): string {
  const strength = Math.min(1, Math.sqrt(Math.abs(delta)) * 2.2);
  if (Math.abs(delta) < 0.001) return oklch(dark ? 0.37 : 0.9, 0.004, 250);
  const hue = delta > 0 ? (blind ? 60 : 25) : blind ? 250 : 150;
  const chroma = 0.03 + strength * (dark ? 0.13 : 0.14);
  return oklch(dark ? 0.4 + strength * 0.08 : 0.9 - strength * 0.14, chroma, hue);
}

/** What a search means: part of a name, `"a whole name"`, or `/a pattern/`. An unfinished pattern matches nothing. */
export function matcher(text: string): { test: (name: string) => boolean; error?: string } {
  const pattern = /^\/(.*?)\/?$/s.exec(text);
  if (pattern && text.length > 1) {
    try {
      const compiled = new RegExp(pattern[1] ?? "", "i");
      return { test: (name) => compiled.test(name) };
    } catch (error) {
      return { test: () => false, error: error instanceof Error ? error.message : String(error) };
    }
  }
  const exact = /^"(.*)"$/s.exec(text);
  if (exact) return { test: (name) => name === exact[1] };
  const part = text.toLowerCase();
  return { test: (name) => name.toLowerCase().includes(part) };
}
