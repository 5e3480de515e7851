/** A comparison with one graph for each side, on one scale, with the same frames at the same zoom. */
import { useState } from "preact/hooks";
import { Flame } from "../flame/Flame";
import type { FrameData, Frames } from "../flame/frames";
import { type State, go } from "../state";
import { value } from "../units";

/** Returns the conditions in which two selectors differ, for the headings; the complete texts if there are none. */
function headings({ q, bq }: State): [base: string, comparison: string] {
  const base = bq ?? q;
  const parts = (text: string) => text.replace(/^\s*\{|\}\s*$/g, "").split(/,(?=[a-zA-Z_][a-zA-Z0-9_]*(?:=~|!~|!=|=))/);
  const [left, right] = [parts(base), parts(q)];
  const only = (these: string[], those: string[]) => these.filter((part) => !those.includes(part)).join(", ");
  return [only(left, right) || base, only(right, left) || q];
}

export function Sides({ state, drawn, dark, onFunction }: { state: State; drawn: Frames; dark: boolean; onFunction: (frame: FrameData) => void }) {
  // A frame that is picked on one side is marked on the other too.
  const [current, setCurrent] = useState("");
  const [base, comparison] = headings(state);
  const graph = {
    frames: drawn,
    diff: true,
    dark,
    redGreen: state.redGreen,
    flip: state.flip,
    search: state.search,
    zoom: state.zoom,
    onZoom: (zoom: string) => go({ zoom }),
    onClear: () => go({ search: "" }, true),
    onFunction,
    current,
    onCurrent: setCurrent,
  };
  const amount = (of: number) => value(of, drawn.unit);
  return (
    <div class="sides">
      <Flame {...graph} part="base" title={<><i class="swatch base" /> Base <span class="dim">{amount(drawn.tree.baseTotal[0] ?? 0)} {base && <code>{base}</code>}</span></>} />
      <Flame {...graph} part="comparison" title={<><i class="swatch main" /> Comparison <span class="dim">{amount(drawn.tree.total[0] ?? 0)} {comparison && <code>{comparison}</code>}</span></>} />
    </div>
  );
}
