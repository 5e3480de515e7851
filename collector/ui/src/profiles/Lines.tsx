/** The value over time, as bars or as a heat map: one plot of the selection, and in a comparison one of the base above it. */
import { Choice } from "../parts/parts";
import { type Span, type State, go } from "../state";
import { when } from "../units";
import { EventList } from "./Events";
import { HeatMap } from "./HeatMap";
import { Timeline } from "./Timeline";
import { OTHER_PROFILES, type Selections } from "./selection";
import { format, parse, replace } from "./selector";
import type { Answers } from "./useAnswers";

interface LinesProps {
  state: State;
  selections: Selections;
  answers: Answers;
  dark: boolean;
}

function TimeChoice({ state, answers: { labels } }: LinesProps) {
  return (
    <div class="time-choice">
      {state.heat && (
        <label class="rows-by">
          <span>Rows</span>
          <select class="field" value={state.rows} onChange={(event) => go({ rows: event.currentTarget.value })}>
            <option value="">by value</option>
            {[...new Set([...labels, ...(state.rows ? [state.rows] : [])])].map((name) => <option key={name} value={name}>by {name}</option>)}
          </select>
        </label>
      )}
      <Choice name="How to show time" value={state.heat ? "heat" : "bars"} of={[["bars", "Bars"], ["heat", "Heat map"]]} onChange={(chosen) => go({ heat: chosen === "heat" })} />
    </div>
  );
}

export function Lines(props: LinesProps) {
  const { state, selections, answers, dark } = props;
  const { window, baseWindow, span, bspan, selection, base } = selections;
  /** Selects the profiles of one row of a heat map. */
  const choose = (query: string, apply: (query: string) => void) => (value: string) => {
    const matchers = parse(query);
    if (matchers) apply(format(replace(matchers, { name: state.rows, op: "=", value })));
  };
  const pickBase = (picked: Span | undefined) => go({ bspan: picked, span: state.span ?? span });
  const pick = (picked: Span | undefined) => go({ span: picked, profile: "", ...(state.compare ? { bspan: state.bspan ?? bspan } : {}) });
  const time = (of: { from: number; until: number }) => ({ from: of.from, until: of.until });
  return (
    <section class="lines" aria-label="Over time">
      {state.compare && (
        <div class="line">
          <h2><i class="swatch base" /> Base <span class="dim">{when(base?.from ?? window.from)} – {when(base?.until ?? window.until)}</span></h2>
          {state.heat ? (
            <HeatMap name="The base's value" side="base" answer={answers.baseHeat} by={state.rows} dark={dark} {...time(baseWindow)} span={bspan} onSpan={pickBase} onRow={choose(state.bq ?? state.q, (bq) => go({ bq, zoom: "" }))} />
          ) : (
            <Timeline name="The base's value" side="base" answer={answers.baseLine} {...time(baseWindow)} span={bspan} onSpan={pickBase} />
          )}
        </div>
      )}
      <div class="line">
        {state.compare && <h2><i class="swatch main" /> Comparison <span class="dim">{when(selection.from)} – {when(selection.until)}</span></h2>}
        {state.heat ? (
          <HeatMap name="The value" side="main" answer={answers.heat} events={answers.events} by={state.rows} dark={dark} {...time(window)} span={span} onSpan={pick} onRow={choose(state.q, (q) => go({ ...(state.compare ? {} : OTHER_PROFILES), q, zoom: "" }))} />
        ) : (
          <Timeline name="The value" side="main" answer={answers.line} events={answers.events} {...time(window)} span={span} onSpan={pick} />
        )}
      </div>
      <div class="lines-foot">
        <EventList events={answers.events} open={state.events} />
        <TimeChoice {...props} />
      </div>
    </section>
  );
}
