/** A comparison with one graph for each side, on one scale, with the same frames at the same zoom. */
import { useState } from "preact/hooks";
import { Flame } from "../flame/Flame";
import type { FlameProps } from "../flame/useFlame";
import type { State } from "../state";
import { value } from "../units";

/** Returns the conditions in which two selectors differ, for the headings; the complete texts if there are none. */
function headings({ q, bq }: State): [base: string, comparison: string] {
  const base = bq ?? q;
  const parts = (text: string) => text.replace(/^\s*\{|\}\s*$/g, "").split(/,(?=[a-zA-Z_][a-zA-Z0-9_]*(?:=~|!~|!=|=))/);
  const [left, right] = [parts(base), parts(q)];
  const only = (these: string[], those: string[]) => these.filter((part) => !those.includes(part)).join(", ");
  return [only(left, right) || base, only(right, left) || q];
}

/** `graph`: the properties of the graph that both sides are parts of. */
export function Sides({ state, graph }: { state: State; graph: FlameProps }) {
  // A frame that is picked on one side is marked on the other too.
  const [current, setCurrent] = useState("");
  const [base, comparison] = headings(state);
  const { unit, tree } = graph.frames;
  const both = { ...graph, current, onCurrent: setCurrent };
  return (
    <div class="sides">
      <Flame {...both} part="base" title={<><i class="swatch base" /> Base <span class="dim">{value(tree.baseTotal[0] ?? 0, unit)} {base && <code>{base}</code>}</span></>} />
      <Flame {...both} part="comparison" title={<><i class="swatch main" /> Comparison <span class="dim">{value(tree.total[0] ?? 0, unit)} {comparison && <code>{comparison}</code>}</span></>} />
    </div>
  );
}
