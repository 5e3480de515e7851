/** The choice of two values of one label to compare. It writes both selectors. */
import { useState } from "preact/hooks";
import { type Selection, labelNames, labelValues } from "../api";
import { Combobox } from "../parts/Combobox";
import { Popover } from "../parts/Popover";
import { type State, go } from "../state";
import { format, parse, replace } from "./selector";

export function CompareValues({ state, window }: { state: State; window: Selection }) {
  const [name, setName] = useState("");
  const [values, setValues] = useState<[base: string, comparison: string]>(["", ""]);
  const matchers = parse(state.q);
  // The label may already be in the selector, which must not hide its other values.
  const others = matchers?.filter((matcher) => matcher.name !== name) ?? [];
  const load = (signal: AbortSignal) => labelValues(name, { ...window, query: format(others) }, signal);
  const select = (value: string) => format(replace(matchers ?? [], { name, op: "=", value }));
  const [base, comparison] = values;
  const ready = matchers !== undefined && name !== "" && base !== "" && comparison !== "" && base !== comparison;
  return (
    <Popover class="values" name="Compare two values of a label" label="Two values">
      {(close) => (
        <div class="add-box">
          {!matchers && <p class="bad" role="alert">The selector has a form that only its text field can change. Edit both texts, or clear them.</p>}
          <Combobox
            label="Label"
            value={name}
            onChoose={(chosen) => {
              setName(chosen);
              setValues(["", ""]);
            }}
            load={(signal) => labelNames({ ...window, query: "" }, signal)}
          />
          <Combobox key={`${name} base`} label="Base value" value={base} placeholder={name === "" ? "choose a label first" : ""} load={load} onChoose={(chosen) => setValues([chosen, comparison])} />
          <Combobox key={`${name} comparison`} label="Comparison value" value={comparison} placeholder={name === "" ? "choose a label first" : ""} load={load} onChoose={(chosen) => setValues([base, chosen])} />
          {base !== "" && base === comparison && <p class="bad" role="alert">Choose two different values.</p>}
          <button
            type="button"
            class="primary"
            disabled={!ready}
            onClick={() => {
              go({ q: select(comparison), bq: select(base), shift: 0, span: undefined, bspan: undefined, sides: true, show: "graph", zoom: "" });
              close();
            }}
          >
            Compare side by side
          </button>
        </div>
      )}
    </Popover>
  );
}
