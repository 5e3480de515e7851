/** A flame graph in columns: one entry for each node, so that 100,000 nodes are a few arrays and not 100,000 objects. */
import type { FlameGraph, FlameNode } from "../api";
import type { Sliced } from "../parts/sliced";

/** A frame by itself, without its place in a stack. */
export interface FrameName {
  name: string;
  file: string;
  kernel: boolean;
  inlined: boolean;
  /** True for frames that are not functions: `[truncated]`, `[unknown]`, `[other]`. */
  special: boolean;
}

/** Nodes in the order of a depth-first walk: node 0 is the root, parents precede children, and a subtree is one range. */
export interface Tree {
  /** The distinct frames. */
  names: FrameName[];
  /** Index of each node's frame in `names`. */
  frame: Int32Array;
  /** Each node's parent; -1 for the root. */
  parent: Int32Array;
  /** The index after the last node of each subtree. */
  end: Int32Array;
  total: Float64Array;
  self: Float64Array;
  baseTotal: Float64Array;
  baseSelf: Float64Array;
  /** The part of both totals in which the frame was found by a guess, or rests on one. */
  guessed: Float64Array;
}

/** Values that end at one node. */
export interface Own {
  self: number;
  baseSelf: number;
  guessed: number;
}

/** Nodes between two points where a computation may pause. */
export const NODES_OF_STEP = 2048;

const isSpecial = (name: string) => /^\[[^\]]*\]$/.test(name);

/** Collects distinct frames. */
class Names {
  readonly list: FrameName[] = [];
  private readonly known = new Map<string, number[]>();

  index(name: string, file: string, kernel: boolean, inlined: boolean): number {
    const same = this.known.get(name);
    const found = same?.find((at) => {
      const frame = this.list[at] as FrameName;
      return frame.file === file && frame.kernel === kernel && frame.inlined === inlined;
    });
    if (found !== undefined) return found;
    const at = this.list.push({ name, file, kernel, inlined, special: isSpecial(name) }) - 1;
    if (same) same.push(at);
    else this.known.set(name, [at]);
    return at;
  }
}

/** Builds a tree node by node. Totals are sums of the values that end in each subtree. */
export class TreeBuilder {
  private readonly frame: number[] = [];
  private readonly parent: number[] = [];
  private readonly self: number[] = [];
  private readonly baseSelf: number[] = [];
  private readonly guessed: number[] = [];
  private readonly children = new Map<number, number>();

  constructor(readonly names: FrameName[]) {}

  /** Adds a node. The parent must exist already; -1 makes the root. */
  push(parent: number, frame: number): number {
    this.parent.push(parent);
    this.self.push(0);
    this.baseSelf.push(0);
    this.guessed.push(0);
    return this.frame.push(frame) - 1;
  }

  /** Returns the child of `parent` with this frame, which it adds if there is none. */
  child(parent: number, frame: number): number {
    // Exact up to 2^53: 100,000 nodes of as many names need 2^34.
    const key = parent * this.names.length + frame;
    let found = this.children.get(key);
    if (found === undefined) {
      found = this.push(parent, frame);
      this.children.set(key, found);
    }
    return found;
  }

  add(node: number, own: Own): void {
    this.self[node] = (this.self[node] ?? 0) + own.self;
    this.baseSelf[node] = (this.baseSelf[node] ?? 0) + own.baseSelf;
    this.guessed[node] = (this.guessed[node] ?? 0) + own.guessed;
  }

  /** Returns the tree, its nodes in depth-first order. */
  *finish(): Sliced<Tree> {
    const count = this.frame.length;
    const size = new Int32Array(count).fill(1);
    for (let at = count - 1; at > 0; at -= 1) {
      const parent = this.parent[at] as number;
      size[parent] = (size[parent] as number) + (size[at] as number);
    }
    yield;
    const tree: Tree = {
      names: this.names,
      frame: new Int32Array(count),
      parent: new Int32Array(count),
      end: new Int32Array(count),
      total: new Float64Array(count),
      self: new Float64Array(count),
      baseTotal: new Float64Array(count),
      baseSelf: new Float64Array(count),
      guessed: new Float64Array(count),
    };
    // A node follows its parent and the subtrees of its older siblings.
    const position = new Int32Array(count);
    const next = new Int32Array(count);
    for (let at = 0; at < count; at += 1) {
      if (at % NODES_OF_STEP === 0) yield;
      const parent = this.parent[at] as number;
      const here = parent < 0 ? 0 : (next[parent] as number);
      if (parent >= 0) next[parent] = here + (size[at] as number);
      position[at] = here;
      next[at] = here + 1;
      tree.frame[here] = this.frame[at] as number;
      tree.parent[here] = parent < 0 ? -1 : (position[parent] as number);
      tree.end[here] = here + (size[at] as number);
      tree.self[here] = tree.total[here] = this.self[at] as number;
      tree.baseSelf[here] = tree.baseTotal[here] = this.baseSelf[at] as number;
      tree.guessed[here] = this.guessed[at] as number;
    }
    for (let at = count - 1; at > 0; at -= 1) {
      const parent = tree.parent[at] as number;
      for (const column of [tree.total, tree.baseTotal, tree.guessed]) column[parent] = (column[parent] as number) + (column[at] as number);
    }
    return tree;
  }
}

/** Converts an answer of the collector. Its totals stay as they are. */
export function* fromGraph(graph: FlameGraph): Sliced<Tree> {
  const names = new Names();
  const builder = new TreeBuilder(names.list);
  const sources: FlameNode[] = [];
  const from: FlameNode = { ...(graph.root ?? { name: "all" }), name: "all" };
  const open: [FlameNode, number][] = [[from, -1]];
  for (let next = open.pop(); next; next = open.pop()) {
    if (sources.length % NODES_OF_STEP === 0) yield;
    const [node, parent] = next;
    const at = builder.push(parent, names.index(node.name, node.file ?? "", node.kernel ?? false, node.inlined ?? false));
    sources.push(node);
    const children = node.children ?? [];
    // In reverse, so that the first child is the next node.
    for (let child = children.length - 1; child >= 0; child -= 1) open.push([children[child] as FlameNode, at]);
  }
  const tree = yield* builder.finish();
  for (let at = 0; at < sources.length; at += 1) {
    if (at % NODES_OF_STEP === 0) yield;
    const node = sources[at] as FlameNode;
    tree.total[at] = node.total ?? 0;
    tree.self[at] = node.self ?? 0;
    tree.baseTotal[at] = node.base_total ?? 0;
    tree.baseSelf[at] = node.base_self ?? 0;
    tree.guessed[at] = (node.guessed ?? 0) + (node.base_guessed ?? 0);
  }
  return tree;
}

/** Returns the guessed part that no child of a node has, for each node. */
export function ownGuesses(tree: Tree): Float64Array {
  const own = tree.guessed.slice();
  for (let at = tree.frame.length - 1; at > 0; at -= 1) {
    const parent = tree.parent[at] as number;
    own[parent] = (own[parent] as number) - (tree.guessed[at] as number);
  }
  return own.map((part) => Math.max(0, part));
}
