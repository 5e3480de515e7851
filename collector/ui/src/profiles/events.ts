/** What happened in a range: captures and changes of rules, as text. */
import type { Annotations, CaptureEvent, ChangeEvent } from "../api";
import { clock, duration, integer, when } from "../units";

/** Returns what a change did: `set: added hot, removed cold`. */
export function describeChange({ action, added, removed, changed, scope, who, revision, note }: ChangeEvent): string {
  const part = (verb: string, ids: string[]) => (ids.length > 0 ? [`${verb} ${ids.join(", ")}`] : []);
  const parts = [...part("added", added), ...part("changed", changed), ...part("removed", removed)];
  const what = action === "capture" ? "capture by hand" : `rules of ${scope || "all scopes"}: ${parts.length > 0 ? parts.join("; ") : action}`;
  return `${what}${who ? `, by ${who}` : ""}${revision > 0 && action !== "capture" ? `, revision ${revision}` : ""}${note ? ` (${note})` : ""}`;
}

const names = (all: string[]) => (all.length > 2 ? `${all.slice(0, 2).join(", ")} and others` : all.join(", "));

export function describeCapture({ rule_id, reason, services, nodes, profiles }: CaptureEvent): string {
  const where = [names(services), nodes.length > 0 ? `on ${names(nodes)}` : ""].filter(Boolean).join(" ");
  return `capture of rule ${rule_id}${where ? ` of ${where}` : ""}: ${reason || "no reason"}, ${integer(profiles)} ${profiles === 1 ? "profile" : "profiles"}`;
}

/** Returns the events within `reach` milliseconds of a moment, as text. */
export function eventsAt({ changes, captures }: Annotations, at: number, reach: number): string[] {
  return [
    ...captures.filter(({ start_ms, end_ms }) => start_ms - reach <= at && at < end_ms + reach).map(describeCapture),
    ...changes.filter(({ at_ms }) => Math.abs(at_ms - at) <= reach).map((change) => `${clock(change.at_ms)} ${describeChange(change)}`),
  ];
}

export const lengthOf = ({ start_ms, end_ms }: CaptureEvent): string => `${when(start_ms)}, ${duration(end_ms - start_ms)}`;
