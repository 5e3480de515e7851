/** What happened in a range: captures and changes of rules, as text. */
import type { Annotations, CaptureEvent, ChangeEvent } from "../api";
import { clock, duration, integer, when } from "../units";
import type { Plot } from "./plot";

/** Entries of the audit log that change no rules. */
const OTHER_ACTIONS: Record<string, string> = { capture: "capture by hand", "delete-profiles": "deletion of profiles" };

/** Returns what a change did: `rules of shop: added hot; removed cold, by ada, revision 3`. */
export function describeChange({ action, added, removed, changed, scope, who, revision, note }: ChangeEvent): string {
  const part = (verb: string, ids: string[]) => (ids.length > 0 ? [`${verb} ${ids.join(", ")}`] : []);
  const parts = [...part("added", added), ...part("changed", changed), ...part("removed", removed)];
  const what = OTHER_ACTIONS[action] ?? `rules of ${scope || "all scopes"}: ${parts.length > 0 ? parts.join("; ") : action}`;
  return `${what}${who ? `, by ${who}` : ""}${revision > 0 ? `, revision ${revision}` : ""}${note ? ` (${note})` : ""}`;
}

const names = (all: string[]) => (all.length > 2 ? `${all.slice(0, 2).join(", ")} and others` : all.join(", "));

export function describeCapture({ rule_id, reason, services, nodes, profiles }: CaptureEvent): string {
  const where = [names(services), nodes.length > 0 ? `on ${names(nodes)}` : ""].filter(Boolean).join(" ");
  return `capture of rule ${rule_id}${where ? ` of ${where}` : ""}: ${reason || "no reason"}, ${integer(profiles)} ${profiles === 1 ? "profile" : "profiles"}`;
}

/** Returns the events at the cursor, as text to append to its values. */
export function eventsAt(events: Annotations | undefined, at: number, { step, length }: Plot, width: number): string {
  const { changes = [], captures = [] } = events ?? {};
  // A cursor of the keyboard stands in the middle of a step, and one of the pointer hits a mark a few pixels away.
  const reach = Math.max(step / 2, 4 * (length / Math.max(1, width)));
  return [
    ...captures.filter(({ start_ms, end_ms }) => start_ms - reach <= at && at < end_ms + reach).map(describeCapture),
    ...changes.filter(({ at_ms }) => Math.abs(at_ms - at) <= reach).map((change) => `${clock(change.at_ms)} ${describeChange(change)}`),
  ].map((text) => ` · ${text}`).join("");
}

export const lengthOf = ({ start_ms, end_ms }: CaptureEvent): string => `${when(start_ms)}, ${duration(end_ms - start_ms)}`;
