/** The choice of profiles by service, by label, or by a selector. All of them edit the same selector text. */
import { useLayoutEffect, useState } from "preact/hooks";
import { type ApiError, type Selection, labelNames, labelValues } from "../api";
import { Combobox } from "../parts/Combobox";
import { Choice } from "../parts/parts";
import { Popover } from "../parts/Popover";
import { type Matcher, format, parse, pinned, replace } from "./selector";

function AddFilter(props: { window: Selection; onAdd: (name: string, op: "=" | "!=" | "=~", value: string) => void }) {
  const [name, setName] = useState("");
  const [op, setOp] = useState<"=" | "!=" | "=~">("=");
  return (
    <Popover class="add" name="Add a filter by label" label={<span><span aria-hidden="true">+ </span>Label</span>}>
      {(close) => (
        <div class="add-box">
          <Combobox label="Label" value={name} onChoose={setName} load={(signal) => labelNames(props.window, signal)} />
          <div class="ops">
            <Choice name="Relation" value={op} of={[["=", "is"], ["!=", "is not"], ["=~", "matches"]]} onChange={setOp} />
          </div>
          <Combobox
            key={name}
            label="Value"
            value=""
            placeholder={name === "" ? "choose a label first" : op === "=~" ? "a pattern: checkout-.*" : ""}
            onChoose={(chosen) => {
              if (name === "" || chosen === "") return;
              props.onAdd(name, op, chosen);
              close();
            }}
            load={(signal) => labelValues(name, props.window, signal)}
          />
        </div>
      )}
    </Popover>
  );
}

export function SelectorBar(props: { name: string; query: string; window: Selection; error: ApiError | undefined; onQuery: (query: string) => void }) {
  const { query, error, onQuery } = props;
  const [text, setText] = useState(query);
  const [uneditable, setUneditable] = useState(false);
  useLayoutEffect(() => {
    setText(query);
    setUneditable(false);
  }, [query]);
  const matchers = parse(query);
  const service = pinned(matchers, "service_name");
  /** Applies a change to the conditions. A text that this page cannot read stays as it is. */
  const edit = (change: (matchers: Matcher[]) => Matcher[]) => {
    if (matchers) onQuery(format(change(matchers)));
    else setUneditable(true);
  };
  const id = `selector-${props.name.replace(/\W/g, "")}`;
  return (
    <>
      <Combobox
        label={`${props.name}service`.replace(/^\w/, (letter) => letter.toUpperCase())}
        value={service}
        placeholder="All services"
        none="All services"
        load={(signal) => labelValues("service_name", { ...props.window, query: "" }, signal)}
        onChoose={(chosen) =>
          edit((present) =>
            chosen === ""
              ? present.filter(({ name }) => name !== "service_name")
              : replace(present, { name: "service_name", op: "=", value: chosen }),
          )
        }
      />
      <form
        class="selector"
        onSubmit={(event) => {
          event.preventDefault();
          onQuery(text.trim());
        }}
      >
        <label class="label" for={id}>Selector</label>
        <input
          id={id}
          class="field mono"
          type="text"
          spellcheck={false}
          autocomplete="off"
          autocapitalize="off"
          placeholder={'{service_name="checkout",pod=~"checkout-.*"}'}
          value={text}
          aria-invalid={error !== undefined}
          aria-describedby={error ? `${id}-error` : undefined}
          onInput={(event) => setText(event.currentTarget.value)}
          onBlur={() => text.trim() !== query && onQuery(text.trim())}
        />
        {error && <p class="bad" id={`${id}-error`} role="alert">{error.message}</p>}
      </form>
      <AddFilter window={{ ...props.window, query: matchers ? query : "" }} onAdd={(name, op, value) => edit((present) => replace(present, { name, op, value }))} />
      {uneditable && <p class="bad" role="alert">This selector has a form that only its text field can change. Edit the text, or clear it.</p>}
    </>
  );
}
