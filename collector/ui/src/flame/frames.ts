/** The frames that the graph draws, and their colours. */
import type { FlameGraph, FlameNode } from "../api";
import type { Colour } from "../state";

export interface FrameData {
  name: string;
  file: string;
  total: number;
  self: number;
  baseTotal: number;
  baseSelf: number;
  /** The share of the samples, of both sides, in which the frame was found by a guess or rests on one. */
  guessed: number;
  kernel: boolean;
  inlined: boolean;
  /** True for frames that are not functions: `[truncated]`, `[unknown]`, `[other]`. */
  special: boolean;
  group: string;
  /** Identifies the path from the root to this frame. It is the same in other ranges, for links and refreshes. */
  key: string;
  /** The value that the width shows. */
  value: number;
  /** The share in the comparison minus the share in the base. */
  delta: number;
  children: FrameData[];
}

export interface Frames {
  root: FrameData;
  unit: string;
  total: number;
  baseTotal: number;
  count: number;
  /** Groups by their self value, largest first. */
  groups: { name: string; self: number }[];
  /** The hue of each group. */
  hues: Map<string, number>;
}

/** Hashes a text with FNV-1a, for keys and hues. */
function hash(text: string, seed = 0x811c9dc5): number {
  let state = seed;
  for (let at = 0; at < text.length; at += 1) {
    state = Math.imul(state ^ text.charCodeAt(at), 0x01000193) >>> 0;
  }
  return state;
}

/** Combines two hashes of 32 bits. With 20,000 frames, one hash of 32 bits would give two frames the same key now and then. */
const keyOf = (path: string) => hash(path).toString(36) + hash(path, 0x9747b28c).toString(36);

const isSpecial = (name: string) => /^\[[^\]]*\]$/.test(name);

/** The languages of mappings that stand for an interpreter. */
const LANGUAGES = new Map([
  ["[cpython]", "python"],
  ["[jvm]", "java"],
  ["[php]", "php"],
  ["[ruby]", "ruby"],
  ["[v8]", "javascript"],
]);

/** Returns the language of the functions in a mapping that stands for an interpreter; undefined for a file. */
const languageOf = (file: string) => LANGUAGES.get(file);

/** Returns the origin of a function: its crate, package or namespace if the name has one, else its binary. */
export function packageOf(name: string, file: string): string {
  // `handle (app.py:12)`: the source file.
  if (languageOf(file)) return /\(([^()]*):\d+\)$/.exec(name)?.[1] ?? file;
  const bare = name.replace(/^<+(?:&|mut |dyn |\*const |\*mut )*/, "");
  const scoped = /^([A-Za-z_~][\w.$-]*?)(?:\[[0-9a-f]+\])?(?:<[^:]*>)?::/.exec(bare);
  if (scoped?.[1]) return scoped[1];
  const dotted = /^((?:[\w.~-]+\/)+[\w~-]+|[a-z][\w]*)\.[(*\w]/.exec(name);
  // `memcpy.part.0` has the suffix of a compiler, not a package.
  if (dotted?.[1] && !/\.(?:part|constprop|isra|cold|llvm|lto_priv)\b/.test(name)) return dotted[1];
  return file || "[unknown]";
}

export function groupOf(frame: FrameData, colour: Colour): string {
  if (frame.special) return "not a function";
  const language = languageOf(frame.file);
  if (language && colour !== "package") return language;
  if (colour === "kind") return frame.kernel ? "kernel" : frame.inlined ? "user, inlined" : "user";
  if (frame.kernel) return "kernel";
  return colour === "binary" ? frame.file || "[unknown]" : packageOf(frame.name, frame.file);
}

/** Converts an answer of the collector into frames. It does not recurse, because a graph may be thousands of frames deep. */
export function frames(graph: FlameGraph, colour: Colour, absolute: boolean): Frames {
  const total = graph.total ?? 0;
  const baseTotal = graph.base_total ?? 0;
  const diff = baseTotal > 0 || graph.base_profiles !== undefined;
  const groups = new Map<string, number>();
  const shareOf = (part: number, whole: number) => (whole > 0 ? part / whole : 0);
  // A special frame with children has no self value, so its total counts.
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
      guessed: shareOf((node.guessed ?? 0) + (node.base_guessed ?? 0), amount + baseAmount),
      kernel: node.kernel ?? false,
      inlined: node.inlined ?? false,
      special: isSpecial(node.name),
      group: "",
      key: keyOf(`${parent}/${node.name}/${node.file ?? ""}/${node.kernel ?? false}/${node.inlined ?? false}`),
      // The width shows both sides, so that new and removed functions are visible. Shares are scaled to large numbers,
      // because the component subtracts the values of children and small fractions would leave rounding errors.
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
  if (group === "user") return oklch(light, 0.095, 55);
  if (group === "python") return oklch(light, 0.1, 155);
  if (group === "java") return oklch(light, 0.1, 20);
  if (group === "javascript") return oklch(light, 0.1, 185);
  if (group === "user, inlined") return oklch(light, 0.085, 100);
  // The modules of a group have slightly different hues.
  const lean = ((hash(name.replace(/::[^:]*$/, "")) >>> 12) % 5) - 2;
  return oklch(light, dark ? 0.085 : 0.1, (360 + (hues.get(group) ?? 35) + (name === group ? 0 : lean * 6)) % 360);
}

export const matchColour = (dark: boolean) => oklch(dark ? 0.5 : 0.78, dark ? 0.19 : 0.16, 325);

/** Returns red (or orange) for more in the comparison and green (or blue) for less. The square root of the change sets the strength. */
export function changeColour(delta: number, dark: boolean, blind: boolean): string {
  const strength = Math.min(1, Math.sqrt(Math.abs(delta)) * 2.2);
  if (Math.abs(delta) < 0.001) return oklch(dark ? 0.37 : 0.9, 0.004, 250);
  const hue = delta > 0 ? (blind ? 60 : 25) : blind ? 250 : 150;
  const chroma = 0.03 + strength * (dark ? 0.13 : 0.14);
  return oklch(dark ? 0.4 + strength * 0.08 : 0.9 - strength * 0.14, chroma, hue);
}

/** Parses a search: part of a name, `"a whole name"`, or `/a pattern/`. An unfinished pattern matches nothing. */
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
