/** The main view: controls for the selection, its timelines, and its profiles as graph, table or list. */
import { useMemo } from "preact/hooks";
import { Flame } from "../flame/Flame";
import { type Frames, matcher } from "../flame/frames";
import { Problem } from "../parts/parts";
import { type State, go } from "../state";
import { BaseControls, Controls } from "./Controls";
import { Legend } from "./Legend";
import { Lines } from "./Lines";
import { List } from "./List";
import { Nothing } from "./Nothing";
import { Table } from "./Table";
import { Toolbar } from "./Toolbar";
import { type Selections, useSelections } from "./selection";
import { type Answers, useAnswers } from "./useAnswers";

interface ResultsProps {
  state: State;
  tick: number;
  dark: boolean;
  selections: Selections;
  answers: Answers;
}

/** The graph and the table, alone or side by side. */
function Panes({ state, dark, answers: { top, diff }, drawn }: ResultsProps & { drawn: Frames }) {
  const pattern = useMemo(() => matcher(state.search), [state.search]);
  const focusFunction = (name: string) => go({ search: `"${name}"`, zoom: "", show: state.show === "table" ? "both" : state.show });
  return (
    <div class={`panes ${state.show}`}>
      {state.show !== "graph" && (top.data ? (
        <Table top={top.data} diff={diff} blind={state.blind} search={state.search} matches={pattern.test} onFocus={focusFunction} />
      ) : top.error ? <Problem error={top.error} /> : <p class="dim none">Loading…</p>)}
      {state.show !== "table" && (
        <Flame
          frames={drawn}
          diff={diff}
          dark={dark}
          blind={state.blind}
          flip={state.flip}
          search={state.search}
          zoom={state.zoom}
          onZoom={(zoom) => go({ zoom })}
          onClear={() => go({ search: "" }, true)}
        />
      )}
    </div>
  );
}

function Results(props: ResultsProps) {
  const { state, tick, dark, selections: { badTime, selection }, answers } = props;
  const { type, drawn, diff, isEmpty, busy, failure, queryError } = answers;
  const isList = state.show === "list";
  return (
    <section class="results" aria-label="What they say" aria-busy={busy}>
      {!queryError && !(isEmpty && !isList) && <Toolbar {...props} />}
      {failure && <Problem error={failure} />}
      {queryError && <p class="dim none">Correct the selector to see profiles.</p>}
      {!failure && !queryError && !badTime && !isList && isEmpty && <Nothing state={state} selection={selection} isSpan={state.span !== undefined} />}
      {isList && !queryError && <List selection={selection} tick={tick} onShow={({ id, sample_types }) =>
        // The profile may be of another kind than the shown type.
        go({ profile: id, type: sample_types.includes(type) ? type : (sample_types.at(-1) ?? ""), show: "graph", compare: false, zoom: "" })
      } />}
      {!isList && !isEmpty && !queryError && drawn && (
        <>
          {state.show !== "table" && <Legend drawn={drawn} diff={diff} dark={dark} blind={state.blind} absolute={state.absolute} />}
          <Panes {...props} drawn={drawn} />
        </>
      )}
    </section>
  );
}

export function Profiles({ state, tick, dark }: { state: State; tick: number; dark: boolean }) {
  const selections = useSelections(state, tick);
  const answers = useAnswers(state, selections);
  const parts = { state, selections, answers };
  return (
    <main class="profiles">
      <h1 class="visually-hidden">Profiles</h1>
      <Controls {...parts} />
      {state.compare && <BaseControls {...parts} />}
      {selections.badTime && <div class="problem" role="alert"><strong>Invalid time range</strong><span>“{state.from}” to “{state.until}”: write now, now-15m, milliseconds or a date; the end must be after the start.</span></div>}
      <Lines {...parts} />
      <Results {...parts} tick={tick} dark={dark} />
    </main>
  );
}
