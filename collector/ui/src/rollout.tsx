/** States and errors of rollouts and rules, for the views of nodes and rules. */
import type { RuleError } from "./api";

const KINDS: Record<string, string> = {
  applied: "ok",
  capturing: "ok",
  waiting: "calm",
  skipped: "calm",
  expired: "calm",
  pending: "busy",
  partial: "warn",
  unsupported: "warn",
  rejected: "bad",
  offline: "bad",
};

const word = (state: string) => state.toLowerCase().replace(/^state_/, "") || "unknown";

export function StateBadge({ state }: { state: string }) {
  return <span class={`badge ${KINDS[word(state)] ?? "calm"}`}>{word(state)}</span>;
}

export function Errors({ errors }: { errors: RuleError[] | undefined }) {
  if (!errors || errors.length === 0) return <span class="dim">—</span>;
  return (
    <ul class="errors">
      {errors.map((error) => (
        <li key={`${error.rule_id} ${error.field} ${error.reason}`}>
          {(error.rule_id || error.field) && <code>{[error.rule_id, error.field].filter(Boolean).join(" · ")}</code>} {error.reason}
        </li>
      ))}
    </ul>
  );
}

/** Counts states: `3 applied, 1 rejected`. */
export function tally(states: string[]): string {
  const counts = new Map<string, number>();
  for (const state of states) counts.set(word(state), (counts.get(word(state)) ?? 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1]).map(([state, count]) => `${count} ${state}`).join(", ");
}
