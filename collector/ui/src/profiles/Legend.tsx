/** The legend of the graph: the groups with their colours, or the colours of a comparison. */
import { type Frames, changeColour, groupColour } from "../flame/frames";
import { share } from "../units";

const RAMP = [-0.4, -0.2, -0.08, -0.02, 0, 0.02, 0.08, 0.2, 0.4];
const MAX_GROUPS = 8;

interface LegendProps {
  drawn: Frames;
  dark: boolean;
  redGreen: boolean;
  absolute: boolean;
  /** True if both sides have a graph of their own. */
  sides: boolean;
}

export function Legend({ drawn, dark, redGreen, absolute, sides }: LegendProps) {
  const { guessed } = drawn.data(0);
  return (
    <div class="legend">
      {drawn.diff ? (
        <>
          <span>less than the base</span>
          <span class="ramp" role="img" aria-label="From less, through the same, to more">
            {RAMP.map((delta) => (
              <i key={delta} style={{ background: changeColour(delta, dark, redGreen) }} />
            ))}
          </span>
          <span>more than the base</span>
          <span class="dim">{sides ? "· both graphs have one scale" : "· the width is the sum of both sides"}{absolute ? "" : sides ? ": the share of each total" : ", as shares of their totals"}</span>
        </>
      ) : (
        drawn.groups.filter((group) => group.self > 0).slice(0, MAX_GROUPS).map((group) => (
          <span key={group.name} title={`${share(group.self, drawn.total)} self`}>
            <i style={{ background: groupColour(drawn.hues, group.name, dark) }} /> {group.name} <span class="dim">{share(group.self, drawn.total)}</span>
          </span>
        ))
      )}
      {guessed > 0 && (
        <span class="guess">
          <i class="hatched" /> guessed: found by frame pointer, without an unwind table <span class="dim">in {share(guessed, 1)} of the samples</span>
        </span>
      )}
    </div>
  );
}
