/** The bar above the results: totals, search, the choice of the view, options, downloads. */
import { selectionParameters, url } from "../api";
import { Choice, Toggle } from "../parts/parts";
import { Popover } from "../parts/Popover";
import { mistakeInSpans, spanParameters } from "../spans";
import { type State, go } from "../state";
import { clock, integer, share, typeName, value, when } from "../units";
import { FilterChips, Filters, OF_NAMES } from "./Filters";
import { ReadNote } from "./ReadNote";
import { SearchField } from "./SearchField";
import type { Selections } from "./selection";
import type { Answers } from "./useAnswers";

interface ToolbarProps {
  state: State;
  selections: Selections;
  answers: Answers;
}

/** The number of profiles that the graph lacks, because the collector cannot read their files. */
function Unreadable({ graph }: Pick<Answers, "graph">) {
  const count = graph?.unreadable_profiles ?? 0;
  if (count === 0) return null;
  return <span class="bad" role="status"> {integer(count)} unreadable {count === 1 ? "profile is" : "profiles are"} missing</span>;
}

/** The note that the next answer may have more names. */
function MissingNames({ graph }: Pick<Answers, "graph">) {
  if (!graph?.names_incomplete) return null;
  return <span class="dim" role="status"> names are missing: the collector still reads debug information; refresh in a minute</span>;
}

function Totals({ graph, diff, drawn, total, baseTotal }: Answers) {
  const unit = graph?.unit ?? "";
  // A filter shows a part of the selection.
  const shown = drawn?.tree.total[0] ?? total;
  const baseShown = drawn?.tree.baseTotal[0] ?? baseTotal;
  if (diff) {
    return (
      <>
        <span class="big">{value(shown, unit)}</span>
        <span class="dim"> against {value(baseShown, unit)}{shown + baseShown < total + baseTotal && <> · {share(shown, total)} and {share(baseShown, baseTotal)} of the selections</>} · {integer(graph?.profiles ?? 0)} and {integer(graph?.base_profiles ?? 0)} profiles</span>
        <Unreadable graph={graph} /><MissingNames graph={graph} /><ReadNote read={graph?.read} />
      </>
    );
  }
  if (!graph) return null;
  return (
    <>
      <span class="big">{value(shown, unit)}</span>{" "}
      <span class="dim">{shown < total && `${share(shown, total)} of ${value(total, unit)} `}{typeName(graph.sample_type)} · {integer(graph.profiles ?? 0)} {graph.profiles === 1 ? "profile" : "profiles"}</span>
      <Unreadable graph={graph} /><MissingNames graph={graph} /><ReadNote read={graph?.read} />
    </>
  );
}

/** Restrictions that the reader can remove: the picked range, the single profile. */
function Chips({ state }: { state: State }) {
  return (
    <>
      {state.span && !state.compare && (
        <span class="chip">
          {when(state.span[0])} – {clock(state.span[1])}
          <button type="button" onClick={() => go({ from: String(state.span?.[0]), until: String(state.span?.[1]), span: undefined, live: false })}>Zoom in</button>
          <button type="button" aria-label="Clear the picked range" onClick={() => go({ span: undefined })}>✕</button>
        </span>
      )}
      {state.profile && (
        <span class="chip">
          only profile <code>{state.profile}</code>
          <button type="button" aria-label="Show all profiles again" onClick={() => go({ profile: "" })}>✕</button>
        </span>
      )}
    </>
  );
}

function GraphOptions({ state }: { state: State }) {
  return (
    <Popover class="options-button" name="Options of the graph" label="Options">
      {() => (
        <div class="options-box">
          <span class="label">Colour by</span>
          <Choice name="Colour by" value={state.colour} of={[["package", "Package"], ["binary", "Library"], ["kind", "Kind"]]} onChange={(colour) => go({ colour }, true)} />
          <Toggle name="Root at the bottom" on={state.flip} onChange={(flip) => go({ flip }, true)} />
          <Toggle name="Frames of interpreters" title="Show the C functions of an interpreter between the functions that it runs" on={state.interpreters} onChange={(interpreters) => go({ interpreters }, true)} />
          <Toggle name="Hide error frames" title="Leave out frames that say what a stack lacks, such as [truncated]; their values stay with their callers" on={state.hideErrors} onChange={(hideErrors) => go({ hideErrors }, true)} />
          <Toggle name="Red and green differences" title="Instead of orange and blue, which more readers can distinguish" on={state.redGreen} onChange={(redGreen) => go({ redGreen }, true)} />
          <Toggle name="Compare amounts, not shares" on={state.absolute} onChange={(absolute) => go({ absolute }, true)} />
        </div>
      )}
    </Popover>
  );
}

function Download({ state, selections: { selection, base }, answers: { type, isEmpty, graph, total, baseTotal } }: ToolbarProps) {
  const spans = spanParameters(state.spans);
  const isNothing = state.spans !== "" && total + baseTotal === 0;
  if (state.profile && !isNothing) {
    return <a class="field button" href={url(`profiles/${encodeURIComponent(state.profile)}`, spans)} download>Download pprof</a>;
  }
  if (isEmpty || isNothing || !graph) return <button type="button" class="field" disabled>Download pprof</button>;
  const merged = url("merge", { ...selectionParameters(selection), ...spans, type });
  if (!base) return <a class="field button" href={merged} download>Download pprof</a>;
  return (
    <Popover name="Download pprof" label="Download pprof">
      {() => (
        <div class="options-box">
          <a class="field button" href={merged} download>Comparison</a>
          <a class="field button" href={url("merge", { ...selectionParameters(base), ...spans, type })} download>Base</a>
        </div>
      )}
    </Popover>
  );
}

export function Toolbar(props: ToolbarProps) {
  const { state, answers } = props;
  const isList = state.show === "list";
  return (
    <div class="toolbar">
      <div class="numbers">
        <Totals {...answers} />
        {answers.busy && <span class="spinner" aria-label="Loading" role="status" />}
        <Chips state={state} />
        {isList ? <FilterChips state={{ ...state, ...OF_NAMES }} mistakes={answers.mistakes.filter((mistake) => mistake === mistakeInSpans(state.spans))} /> : <FilterChips state={state} mistakes={answers.mistakes} />}
      </div>
      <div class="tools">
        <SearchField state={state} />
        {!isList && <Filters state={state} {...answers} />}
        <Choice name="How to show it" value={state.show} of={[["graph", "Graph"], ["both", "Both"], ["sandwich", "Sandwich"], ["table", "Table"], ["list", "Profiles"]]} onChange={(show) => go({ show })} />
        {state.show !== "table" && !isList && <GraphOptions state={state} />}
        <Download {...props} />
      </div>
    </div>
  );
}
