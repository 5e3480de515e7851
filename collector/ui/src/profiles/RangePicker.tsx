/** The time range: presets such as the last hour, or two moments. */
import { useState } from "preact/hooks";
import { Popover } from "../parts/Popover";
import { type State, go } from "../state";
import { PRESETS, isRelative, toLocalInput } from "../time";
import { clock, day, when } from "../units";
import { OTHER_PROFILES } from "./selection";

export function RangePicker({ state, from, until }: { state: State; from: number; until: number }) {
  const [low, setLow] = useState("");
  const [high, setHigh] = useState("");
  const preset = PRESETS.find(([relative]) => relative === state.from && state.until === "now");
  const name = preset ? preset[1] : isRelative(state.from) ? `${state.from} to ${state.until}` : `${when(from)} – ${day(from) === day(until) ? clock(until) : when(until)}`;
  const [start, end] = [Date.parse(low || toLocalInput(from)), Date.parse(high || toLocalInput(until))];
  return (
    <div class="range">
      <span class="label" aria-hidden="true">Time</span>
      <Popover name={`Time range: ${name}`} label={name}>
        {(close) => (
          <div class="range-box">
            <ul class="presets">
              {PRESETS.map(([relative, title]) => (
                <li key={relative}>
                  <button type="button" aria-pressed={preset?.[0] === relative} onClick={() => { go({ ...OTHER_PROFILES, from: relative, until: "now" }); close(); }}>
                    {title}
                  </button>
                </li>
              ))}
            </ul>
            <form
              onSubmit={(event) => {
                event.preventDefault();
                if (!(start < end)) return;
                go({ ...OTHER_PROFILES, from: String(start), until: String(end), live: false });
                close();
              }}
            >
              <label>
                <span>From</span>
                <input class="field" type="datetime-local" step="1" value={low || toLocalInput(from)} onInput={(event) => setLow(event.currentTarget.value)} />
              </label>
              <label>
                <span>Until</span>
                <input class="field" type="datetime-local" step="1" value={high || toLocalInput(until)} onInput={(event) => setHigh(event.currentTarget.value)} />
              </label>
              {!(start < end) && <p class="bad" role="alert">The range must end after it starts.</p>}
              <button type="submit" class="primary">Show this range</button>
            </form>
          </div>
        )}
      </Popover>
    </div>
  );
}
