/** The table of functions of a filtered tree. Without a filter the collector sums it up. */
import type { TopRow } from "../api";
import type { Sliced } from "../parts/sliced";
import { type FrameName, NODES_OF_STEP, type Tree } from "./tree";

/** Sums up each function over all stacks. A stack in which a function calls itself counts once in its total. */
export function* topOf(tree: Tree): Sliced<TopRow[]> {
  const rows: Required<TopRow>[] = [];
  const known = new Map<string, number>();
  const rowOf = tree.names.map(({ name, file }: FrameName) => {
    const key = `${name}\0${file}`;
    let at = known.get(key);
    if (at === undefined) {
      at = rows.push({ name, file, self: 0, total: 0, base_self: 0, base_total: 0 }) - 1;
      known.set(key, at);
    }
    return at;
  });
  /** For each function, the end of the last subtree that counted in its total. */
  const counted = new Int32Array(rows.length);
  for (let at = 1; at < tree.frame.length; at += 1) {
    if (at % NODES_OF_STEP === 0) yield;
    const index = rowOf[tree.frame[at] as number] as number;
    const row = rows[index] as Required<TopRow>;
    row.self += tree.self[at] as number;
    row.base_self += tree.baseSelf[at] as number;
    if (at < (counted[index] as number)) continue;
    counted[index] = tree.end[at] as number;
    row.total += tree.total[at] as number;
    row.base_total += tree.baseTotal[at] as number;
  }
  return rows.filter((row) => row.total > 0 || row.base_total > 0);
}
