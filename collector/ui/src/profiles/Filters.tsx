/** Filters of the shown stacks: by the kind of their frames, by regular expressions on their names, and by spans. */
import { useMemo } from "preact/hooks";
import { kindsOf } from "../flame/filter";
import { mistakeIn } from "../flame/pattern";
import { useTyped } from "../parts/hooks";
import { Popover } from "../parts/Popover";
import { mistakeInSpans, spanParameter } from "../spans";
import { type State, go } from "../state";
import { share } from "../units";
import type { Answers } from "./useAnswers";

/** Changes that remove the filters by names and kinds of frames. A list of profiles knows none of these. */
export const OF_NAMES: Pick<State, "hide" | "only" | "without"> = { hide: [], only: "", without: "" };
/** Changes that remove all filters. */
const NONE: Partial<State> = { ...OF_NAMES, spans: "" };

interface FilterFieldProps {
  id: string;
  label: string;
  placeholder: string;
  value: string;
  /** Returns the mistake in a text. */
  check: (text: string) => string | undefined;
  onChange: (text: string) => void;
}

/** A field of text, which applies 250 ms after the last key, or at Enter. */
function FilterField(props: FilterFieldProps) {
  const { id, onChange } = props;
  const [typed, setTyped] = useTyped(props.value, 250, onChange);
  const error = typed === "" ? undefined : props.check(typed);
  return (
    <div>
      <label class="label" for={id}>{props.label}</label>
      <input
        id={id}
        class="field mono"
        type="text"
        spellcheck={false}
        autocomplete="off"
        autocapitalize="off"
        placeholder={props.placeholder}
        value={typed}
        aria-invalid={error !== undefined}
        aria-describedby={error ? `${id}-error` : undefined}
        onInput={(event) => setTyped(event.currentTarget.value)}
        onKeyDown={(event) => event.key === "Enter" && onChange(typed)}
      />
      {error && <p class="bad" id={`${id}-error`} role="alert">{error}</p>}
    </div>
  );
}

type FiltersProps = { state: State } & Pick<Answers, "tree" | "total" | "baseTotal">;

/** The kinds of frames. A part of its own, so that only an open box sums them up. */
function Kinds({ state: { hide }, tree, total, baseTotal }: FiltersProps) {
  const present = useMemo(() => (tree ? kindsOf(tree) : []), [tree]);
  const kinds = [...present, ...hide.filter((kind) => !present.some(({ name }) => name === kind)).map((name) => ({ name, self: 0 }))];
  return (
    <fieldset>
      <legend class="label">Frames</legend>
      {kinds.map(({ name, self }) => (
        <label key={name} class="check">
          <input type="checkbox" checked={!hide.includes(name)} onChange={(event) => go({ hide: event.currentTarget.checked ? hide.filter((kind) => kind !== name) : [...hide, name], zoom: "" })} />
          <span>{name}</span>
          <span class="dim">{share(self, total + baseTotal)}</span>
        </label>
      ))}
      <p class="dim">The values of hidden frames stay with their callers.</p>
    </fieldset>
  );
}

export function Filters(props: FiltersProps) {
  const { hide, only, without, spans } = props.state;
  const pattern = { placeholder: "a regular expression", check: mistakeIn };
  const count = hide.length + [only, without, spans].filter((text) => text !== "").length;
  return (
    <Popover class={`filters${count > 0 ? " on" : ""}`} hotkey="f" name={count > 0 ? `Filters: ${count} active` : "Filters"} label={count > 0 ? `Filters · ${count}` : "Filters"}>
      {() => (
        <div class="options-box filters-box">
          <Kinds {...props} />
          <FilterField {...pattern} id="filter-only" label="Only stacks with" value={only} onChange={(text) => go({ only: text, zoom: "" }, true)} />
          <FilterField {...pattern} id="filter-without" label="Without stacks with" value={without} onChange={(text) => go({ without: text, zoom: "" }, true)} />
          <FilterField id="filter-spans" label="Only samples of a span or trace" placeholder="an id of 16 or 32 hex digits" value={spans} check={(text) => mistakeInSpans(text.trim())} onChange={(text) => go({ spans: text.trim(), zoom: "" }, true)} />
          <button type="button" class="field button" disabled={count === 0} onClick={() => go({ ...NONE, zoom: "" })}>Remove all filters</button>
        </div>
      )}
    </Popover>
  );
}

/** The active filters, each with a button that removes it, and their mistakes. */
export function FilterChips({ state, mistakes }: { state: State } & Pick<Answers, "mistakes">) {
  const { hide, only, without, spans } = state;
  const chip = (name: string, text: string, change: Partial<State>) => (
    <span class="chip" key={name + text}>
      {name} {text && <code>{text}</code>}
      <button type="button" aria-label={`Remove the filter: ${name} ${text}`} onClick={() => go({ ...change, zoom: "" })}>✕</button>
    </span>
  );
  return (
    <>
      {hide.map((kind) => chip(`no ${kind} frames`, "", { hide: hide.filter((other) => other !== kind) }))}
      {only !== "" && chip("only stacks with", only, { only: "" })}
      {without !== "" && chip("without stacks with", without, { without: "" })}
      {spans !== "" && chip(spanParameter(spans) === "trace_id" ? "only trace" : "only span", spans, { spans: "" })}
      {mistakes.map((mistake) => <span class="bad" role="alert" key={mistake}>{mistake}</span>)}
    </>
  );
}

/** The message for filters that no stack passes. */
export function NothingLeft({ state: { spans } }: { state: State }) {
  return (
    <section class="empty">
      <h2>No stack passes the filters</h2>
      {spans !== "" && <p>A sample has a span only if its program publishes spans. A short span may have no sample.</p>}
      <p class="actions">
        <button type="button" onClick={() => go({ ...NONE, zoom: "" })}>Remove all filters</button>
      </p>
    </section>
  );
}
