/** The main view: controls for the selection, its timelines, and its profiles as graph, table or list. */
import type { TopRow } from "../api";
import { Flame } from "../flame/Flame";
import type { Frames } from "../flame/frames";
import { useSearch } from "../flame/matches";
import { Problem } from "../parts/parts";
import { type State, go } from "../state";
import { BaseControls, Controls } from "./Controls";
import { NothingLeft } from "./Filters";
import { Legend } from "./Legend";
import { Lines } from "./Lines";
import { List } from "./List";
import { Nothing } from "./Nothing";
import { Sandwich } from "./Sandwich";
import { Sides } from "./Sides";
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

/** The graph, the table and the sandwich view, alone or side by side. */
function Panes({ state, dark, answers: { top }, drawn }: ResultsProps & { drawn: Frames }) {
  const { show, fn, fnFile, search, zoom, flip, redGreen } = state;
  // The graphs of a sandwich or of two sides have the same names, so one search serves them all.
  const matches = useSearch(drawn.tree.names, search);
  const openFunction = ({ name, file = "" }: { name: string; file?: string }) => go({ show: "sandwich", fn: name, fnFile: file, zoom: "", ...(show === "sandwich" ? {} : { search: "" }) });
  const findFunction = ({ name }: TopRow) => go({ search: `"${name}"`, zoom: "", show: show === "table" ? "both" : show });
  const isSandwich = show === "sandwich";
  const isSides = show === "graph" && state.sides && drawn.diff;
  const graph = {
    frames: drawn,
    dark,
    redGreen,
    flip,
    search,
    matches,
    zoom,
    onZoom: (to: string) => go({ zoom: to }),
    onClear: () => go({ search: "" }, true),
    onFunction: openFunction,
  };
  return (
    <div class={`panes ${show}`}>
      {show !== "graph" && (top.data ? (
        <Table
          top={top.data}
          redGreen={redGreen}
          search={search}
          sort={state.sort}
          hint={(name) => (isSandwich ? `Show callers and callees of ${name}` : `Show ${name} in the graph`)}
          isChosen={(row) => isSandwich && row.name === fn && (fnFile === "" || (row.file ?? "") === fnFile)}
          onChoose={isSandwich ? openFunction : findFunction}
        />
      ) : top.error ? <Problem error={top.error} /> : <p class="dim none">Loading…</p>)}
      {isSandwich && <Sandwich state={state} graph={graph} />}
      {isSides && <Sides state={state} graph={graph} />}
      {(show === "both" || (show === "graph" && !isSides)) && <Flame {...graph} />}
    </div>
  );
}

function Results(props: ResultsProps) {
  const { state, tick, dark, selections: { badTime, selection }, answers } = props;
  const { type, drawn, isEmpty, busy, failure, queryError } = answers;
  const isList = state.show === "list";
  return (
    <section class="results" aria-label="What they say" aria-busy={busy}>
      {!queryError && !(isEmpty && !isList) && <Toolbar {...props} />}
      {failure && <Problem error={failure} />}
      {queryError && <p class="dim none">Correct the selector to see profiles.</p>}
      {!failure && !queryError && !badTime && !isList && isEmpty && <Nothing state={state} selection={selection} isSpan={state.span !== undefined} />}
      {isList && !queryError && <List selection={selection} spans={state.spans} tick={tick} onShow={({ id, sample_types }) =>
        // The profile may be of another kind than the shown type.
        go({ profile: id, type: sample_types.includes(type) ? type : (sample_types.at(-1) ?? ""), show: "graph", compare: false, zoom: "" })
      } />}
      {!isList && !isEmpty && !queryError && drawn && drawn.count === 1 && <NothingLeft state={state} />}
      {!isList && !isEmpty && !queryError && drawn && drawn.count > 1 && (
        <>
          {state.show !== "table" && <Legend drawn={drawn} dark={dark} redGreen={state.redGreen} absolute={state.absolute} sides={state.sides && state.show === "graph"} />}
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
      <Lines {...parts} dark={dark} />
      <Results {...parts} tick={tick} dark={dark} />
    </main>
  );
}
