/** The timelines: one of the selection, and in a comparison one of the base above it. */
import { type State, go } from "../state";
import { when } from "../units";
import { Timeline } from "./Timeline";
import type { Selections } from "./selection";
import type { Answers } from "./useAnswers";

export function Lines({ state, selections, answers }: { state: State; selections: Selections; answers: Answers }) {
  const { window: { from, until }, baseWindow, span, bspan, selection, base } = selections;
  return (
    <section class="lines" aria-label="Over time">
      {state.compare && (
        <div class="line">
          <h2><i class="swatch base" /> Base <span class="dim">{when(base?.from ?? from)} – {when(base?.until ?? until)}</span></h2>
          <Timeline name="The base's value" side="base" answer={answers.baseLine} from={baseWindow.from} until={baseWindow.until} span={bspan} onSpan={(picked) => go({ bspan: picked, span: state.span ?? span })} />
        </div>
      )}
      <div class="line">
        {state.compare && <h2><i class="swatch main" /> Comparison <span class="dim">{when(selection.from)} – {when(selection.until)}</span></h2>}
        <Timeline name="The value" side="main" answer={answers.line} from={from} until={until} span={span} onSpan={(picked) => go({ span: picked, profile: "", ...(state.compare ? { bspan: state.bspan ?? bspan } : {}) })} />
      </div>
    </section>
  );
}
