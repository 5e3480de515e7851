/** The controls above the timelines: what to show, over which time, and what to compare with. */
import { Choice } from "../parts/parts";
import { type State, go } from "../state";
import { SHIFTS } from "../time";
import { typeName, value } from "../units";
import { CompareValues } from "./CompareValues";
import { RangePicker } from "./RangePicker";
import { SelectorBar } from "./SelectorBar";
import type { Selections } from "./selection";
import type { Answers } from "./useAnswers";

interface ControlsProps {
  state: State;
  selections: Selections;
  answers: Answers;
}

function TypeMenu({ types, type }: Answers) {
  return (
    <label class="type">
      <span class="label">Value</span>
      <select class="field" value={type} onChange={(event) => go({ type: event.currentTarget.value, zoom: "" })}>
        {type === "" && <option value="">—</option>}
        {[...new Set([...types, ...(type ? [type] : [])])].map((entry) => (
          <option key={entry} value={entry}>{typeName(entry)}</option>
        ))}
      </select>
    </label>
  );
}

export function Controls({ state, selections: { window }, answers }: ControlsProps) {
  const { queryError, isBaseError } = answers;
  return (
    <section class="controls" aria-label="Which profiles">
      <SelectorBar name="" query={state.q} window={window} error={isBaseError ? undefined : queryError} onQuery={(q) => go({ q, profile: "", zoom: "" })} />
      <TypeMenu {...answers} />
      <RangePicker state={state} from={window.from} until={window.until} />
      <button type="button" class={`field compare${state.compare ? " on" : ""}`} aria-pressed={state.compare} onClick={() => go({ compare: !state.compare, bspan: undefined, bq: undefined, shift: 0, span: undefined, profile: "", zoom: "" })}>
        Compare
      </button>
    </section>
  );
}

export function BaseControls({ state, selections: { window, baseWindow }, answers: { queryError, isBaseError } }: ControlsProps) {
  const shifts = [...SHIFTS, ...(SHIFTS.some(([ms]) => ms === state.shift) ? [] : [[state.shift, `${value(state.shift * 1e6, "nanoseconds")} earlier`] as const])];
  return (
    <section class="controls base" aria-label="What to compare with">
      <SelectorBar name="base " query={state.bq ?? state.q} window={baseWindow} error={isBaseError ? queryError : undefined} onQuery={(bq) => go({ bq: bq === state.q ? undefined : bq, zoom: "" })} />
      <label class="type">
        <span class="label">Base time</span>
        <select class="field" value={String(state.shift)} onChange={(event) => go({ shift: Number(event.currentTarget.value), bspan: undefined })}>
          {shifts.map(([ms, name]) => (
            <option key={ms} value={String(ms)}>{name}</option>
          ))}
        </select>
      </label>
      <CompareValues state={state} window={window} />
      <Choice name="How to show the comparison" value={state.sides ? "sides" : "one"} of={[["one", "One graph"], ["sides", "Side by side"]]} onChange={(chosen) => go(chosen === "sides" ? { sides: true, show: "graph" } : { sides: false })} />
    </section>
  );
}
