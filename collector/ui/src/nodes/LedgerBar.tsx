/** The samples of a node or of the fleet as one bar: delivered, pending, lost; and those that are missing without a reason. */
import type { Ledger } from "../api";
import { compact, integer } from "../units";

const lostOf = (ledger: Ledger | undefined) => Object.values(ledger?.lost ?? {}).reduce((sum, count) => sum + count, 0);

export function LedgerBar({ ledger, long }: { ledger: Ledger | undefined; long?: boolean }) {
  const taken = ledger?.taken ?? 0;
  if (!ledger || taken === 0) return <span class="dim">no samples yet</span>;
  const delivered = ledger.delivered ?? 0;
  const pending = ledger.pending ?? 0;
  const lost = lostOf(ledger);
  const unaccounted = ledger.unaccounted ?? 0;
  const part = (count: number) => ({ width: `${(100 * count) / taken}%` });
  return (
    <div class="ledger">
      <div class="ledger-bar" role="img" aria-label={`${integer(taken)} samples taken: ${integer(delivered)} delivered, ${integer(pending)} pending, ${integer(lost)} lost, ${integer(unaccounted)} unaccounted`}>
        <i class="delivered" style={part(delivered)} />
        <i class="pending" style={part(pending)} />
        <i class="lost" style={part(lost)} />
      </div>
      <div class="ledger-words">
        {long ? (
          <>
            <b>{integer(taken)}</b> taken = <b class="delivered">{integer(delivered)}</b> delivered + <b class="pending">{integer(pending)}</b> pending + <b class="lost">{integer(lost)}</b> lost + <b class={unaccounted === 0 ? "" : "lost"}>{integer(unaccounted)}</b> unaccounted
          </>
        ) : (
          <>
            {compact(taken)} taken{lost > 0 ? <> · <b class="lost">{compact(lost)} lost</b></> : " · none lost"}
            {unaccounted !== 0 && <> · <b class="lost">{compact(unaccounted)} unaccounted</b></>}
          </>
        )}
      </div>
    </div>
  );
}
