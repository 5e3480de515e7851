/** The callers and the callees of one function, summed over all stacks that contain it. */
import type { Sliced } from "../parts/sliced";
import { NODES_OF_STEP, type Tree, TreeBuilder, ownGuesses } from "./tree";

export interface Sandwich {
  /** The function at the root, its callers above it: a node's children called it. Nothing in it has a self value. */
  callers: Tree;
  /** The function at the root, and what it calls. */
  callees: Tree;
}

/**
 * Builds both graphs of the frames that `focus` marks. A stack in which the function calls itself counts once, at its
 * outermost call, so that the root of both graphs has the function's total. Returns `undefined` without such a frame.
 */
export function* sandwich(tree: Tree, focus: boolean[]): Sliced<Sandwich | undefined> {
  const count = tree.frame.length;
  const [callers, callees] = [new TreeBuilder(tree.names), new TreeBuilder(tree.names)];
  const own = ownGuesses(tree);
  /** The node among the callees for each node that is within the function; -1 outside. */
  const inside = new Int32Array(count).fill(-1);
  let started = false;
  for (let at = 1; at < count; at += 1) {
    if (at % NODES_OF_STEP === 0) yield;
    const frame = tree.frame[at] as number;
    const outer = inside[tree.parent[at] as number] as number;
    if (outer >= 0) {
      inside[at] = callees.child(outer, frame);
    } else if (focus[frame]) {
      if (!started) {
        callers.push(-1, frame);
        callees.push(-1, frame);
        started = true;
      }
      inside[at] = 0;
      let top = 0;
      for (let above = tree.parent[at] as number; above > 0; above = tree.parent[above] as number) top = callers.child(top, tree.frame[above] as number);
      callers.add(top, { self: tree.total[at] as number, baseSelf: tree.baseTotal[at] as number, guessed: tree.guessed[at] as number });
    } else {
      continue;
    }
    callees.add(inside[at] as number, { self: tree.self[at] as number, baseSelf: tree.baseSelf[at] as number, guessed: own[at] as number });
  }
  if (!started) return undefined;
  const above = yield* callers.finish();
  // The values passed through these frames and did not end in them.
  above.self.fill(0);
  above.baseSelf.fill(0);
  return { callers: above, callees: yield* callees.finish() };
}
