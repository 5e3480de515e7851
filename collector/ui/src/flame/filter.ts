/** Filters of a graph by the kind and by the names of frames. */
import type { Sliced } from "../parts/sliced";
import { kindOf } from "./kinds";
import { NODES_OF_STEP, type Tree, TreeBuilder, ownGuesses } from "./tree";

export interface Filter {
  /** Kinds whose frames are left out; their values stay with their callers. */
  hidden: string[];
  /** For each of the tree's names, whether it matches: keeps only stacks with such a frame. */
  only: boolean[] | undefined;
  /** The same: leaves out stacks with such a frame. */
  without: boolean[] | undefined;
}

/** Returns the kinds of a tree's frames with their self values, largest first. */
export function kindsOf(tree: Tree): { name: string; self: number }[] {
  const kinds = tree.names.map(kindOf);
  const sums = new Map<string, number>();
  for (let at = 1; at < tree.frame.length; at += 1) {
    const kind = kinds[tree.frame[at] as number];
    if (kind) sums.set(kind, (sums.get(kind) ?? 0) + (tree.self[at] as number) + (tree.baseSelf[at] as number));
  }
  return [...sums].map(([name, self]) => ({ name, self })).sort((a, b) => b.self - a.self);
}

/** Returns the tree of the stacks that pass the filter, without the frames that it hides. */
export function* filtered(tree: Tree, { hidden, only, without }: Filter): Sliced<Tree> {
  const count = tree.frame.length;
  const hides: boolean[] = [];
  for (const [at, frame] of tree.names.entries()) {
    if (at % NODES_OF_STEP === 0) yield;
    const kind = kindOf(frame);
    hides.push(kind !== undefined && hidden.includes(kind));
  }
  // Whether the stack that ends at a node passes.
  const passes = new Uint8Array(count);
  const [found, refused] = [new Uint8Array(count), new Uint8Array(count)];
  found[0] = only ? 0 : 1;
  for (let at = 0; at < count; at += 1) {
    if (at % NODES_OF_STEP === 0) yield;
    if (at > 0) {
      const parent = tree.parent[at] as number;
      const frame = tree.frame[at] as number;
      found[at] = found[parent] || only?.[frame] ? 1 : 0;
      refused[at] = refused[parent] || without?.[frame] ? 1 : 0;
    }
    passes[at] = found[at] && !refused[at] ? 1 : 0;
  }
  // Nodes with a stack that passes. Others would be frames without a value.
  const live = new Uint8Array(count);
  for (let at = count - 1; at >= 0; at -= 1) {
    if (passes[at] && ((tree.self[at] as number) > 0 || (tree.baseSelf[at] as number) > 0)) live[at] = 1;
    if (at > 0 && live[at]) live[tree.parent[at] as number] = 1;
  }
  const builder = new TreeBuilder(tree.names);
  const own = ownGuesses(tree);
  /** The node of the new tree that has each node's values. */
  const target = new Int32Array(count);
  builder.push(-1, tree.frame[0] as number);
  for (let at = 0; at < count; at += 1) {
    if (at % NODES_OF_STEP === 0) yield;
    if (!live[at]) continue;
    if (at > 0) {
      const above = target[tree.parent[at] as number] as number;
      target[at] = hides[tree.frame[at] as number] ? above : builder.child(above, tree.frame[at] as number);
    }
    if (passes[at]) builder.add(target[at] as number, { self: tree.self[at] as number, baseSelf: tree.baseSelf[at] as number, guessed: own[at] as number });
  }
  return yield* builder.finish();
}
