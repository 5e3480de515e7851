/** Captures and changes of rules: marks below the plot of time, and the same as a list. */
import type { Annotations } from "../api";
import { go } from "../state";
import { integer, when } from "../units";
import { describeCapture, describeChange, lengthOf } from "./eventText";
import type { Plot } from "./plot";

/** Height of the marks, in pixels. */
export const MARKS_HEIGHT = 12;

/** Bars for captures and triangles for changes of rules, at `top`. */
export function Marks({ events, top, plot: { x } }: { events: Annotations | undefined; top: number; plot: Plot }) {
  if (!events) return null;
  return (
    <g class="marks" transform={`translate(0,${top})`}>
      {events.captures.map(({ rule_id, start_ms, end_ms }) => (
        <rect key={`${rule_id} ${start_ms}`} class="capture" x={x(start_ms)} width={Math.max(4, x(end_ms) - x(start_ms))} y={3} height={6} rx={2} />
      ))}
      {events.changes.map(({ at_ms, revision, action }) => (
        <path key={`${at_ms} ${revision} ${action}`} class="change-mark" d={`M${x(at_ms)} 1l4.5 9h-9z`} />
      ))}
    </g>
  );
}

const count = (number: number, one: string, many: string) => `${integer(number)} ${number === 1 ? one : many}`;

/** All events, the newest first. Up to a thousand, so a closed list has none. */
function Entries({ captures, changes, older_captures, older_changes }: Annotations) {
  const older = older_captures + older_changes;
  const all = [
    ...captures.map((capture) => ({ at: capture.start_ms, key: `${capture.rule_id} ${capture.start_ms}`, time: lengthOf(capture), text: describeCapture(capture), capture })),
    ...changes.map((change) => ({ at: change.at_ms, key: `${change.at_ms} ${change.revision} ${change.action}`, time: when(change.at_ms), text: describeChange(change), capture: undefined })),
  ].sort((a, b) => b.at - a.at);
  return (
    <>
      <ul>
        {all.map(({ key, time, text, capture }) => (
          <li key={key}>
            <i class={capture ? "capture-key" : "change-key"} />
            <span class="dim">{time}</span>
            <span>{text}</span>
            {capture && (
              <button type="button" class="quiet" aria-label={`Show the range of the ${text}`} onClick={() => go({ span: [capture.start_ms, capture.end_ms], profile: "", zoom: "" })}>Show</button>
            )}
          </li>
        ))}
      </ul>
      {older > 0 && <p class="dim">{integer(older)} older ones are not shown. Choose a shorter range to see them.</p>}
    </>
  );
}

export function EventList({ events, open }: { events: Annotations | undefined; open: boolean }) {
  if (!events) return null;
  const { captures, changes } = events;
  if (captures.length + changes.length === 0) return <p class="events">No captures or changes of rules in this range</p>;
  return (
    <details class="events" open={open} onToggle={(event) => event.currentTarget.open !== open && go({ events: event.currentTarget.open }, true)}>
      <summary>
        <i class="capture-key" /> {count(captures.length, "capture", "captures")} <i class="change-key" /> {count(changes.length, "change of rules", "changes of rules")}
      </summary>
      {open && <Entries {...events} />}
    </details>
  );
}
