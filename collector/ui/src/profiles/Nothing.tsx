/** The message for a selection without profiles, with buttons that lead to some. */
import { type Selection, type Series, get } from "../api";
import { Welcome } from "../Empty";
import { useLoad } from "../parts/hooks";
import { type State, go } from "../state";
import { typeName, when } from "../units";
import { OTHER_PROFILES } from "./selection";

export function Nothing(props: { state: State; selection: Selection; isSpan: boolean }) {
  const { state, selection } = props;
  // Finds out whether the store has any profiles, and when the selection has some.
  const all = useLoad<{ series?: Series[] }>("all", (signal) => get("series", { from: 0, until: Date.now() + 3600e3 }, signal));
  const here = useLoad<{ series?: Series[] }>(`here ${selection.query}`, (signal) =>
    get("series", { query: selection.query, from: 0, until: Date.now() + 3600e3 }, signal),
  );
  if (all.loading || here.loading) return <p class="dim none">Searching…</p>;
  if (all.data && (all.data.series ?? []).length === 0) return <Welcome />;
  const newest = Math.max(0, ...(here.data?.series ?? []).map((series) => series.last_ms));
  return (
    <section class="empty">
      <h2>No profiles in this selection</h2>
      <p>
        No profile {selection.query ? <>of <code>{selection.query}</code></> : null} starts between {when(selection.from)} and {when(selection.until)}
        {state.type && <> with values of {typeName(state.type)}</>}.
        {newest > 0 ? <> The newest profile started at {when(newest)}.</> : selection.query ? " The store has none from any other time." : ""}
      </p>
      <p class="actions">
        {props.isSpan && <button type="button" onClick={() => go({ span: undefined, bspan: undefined })}>Show the whole window</button>}
        {newest > 0 && (newest < selection.from || newest >= selection.until) && (
          <button type="button" onClick={() => go({ ...OTHER_PROFILES, from: String(newest - 1800e3), until: String(newest + 300e3) })}>Go to the newest</button>
        )}
        {selection.query && <button type="button" onClick={() => go({ ...OTHER_PROFILES, q: "" })}>Show all services</button>}
        {state.profile && <button type="button" onClick={() => go({ profile: "" })}>Show all profiles</button>}
        {state.type && <button type="button" onClick={() => go({ type: "" })}>Show another type</button>}
      </p>
    </section>
  );
}
