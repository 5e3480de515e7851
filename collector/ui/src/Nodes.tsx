/** The fleet: who is connected, what each agent costs, what it lost and why, and which rules it has. */
import { useState } from "preact/hooks";
import { type FleetNode, type Ledger, get } from "./api";
import { Steps } from "./Empty";
import { Problem, useLoad } from "./parts";
import { Errors, StateBadge, tally } from "./rollout";
import { ago, bytes, compact, duration, integer, moment, share, took } from "./units";

const REASONS: Record<string, string> = {
  ring_full: "kernel ring buffer full",
  stack_fault: "stack could not be read",
  stack_missing: "no stack",
  map_full: "kernel map full",
  queue_full: "agent queue full",
  spool_full: "spool full",
  spool_corrupt: "spool damaged",
  refused: "refused by the collector",
  expired: "too old to send",
  too_large: "profile too large",
  shutdown: "agent stopped",
};

const lostOf = (ledger: Ledger | undefined) => Object.values(ledger?.lost ?? {}).reduce((sum, count) => sum + count, 0);

/** Taken samples as one bar: what arrived, what is on its way, what was lost. */
function LedgerBar({ ledger, long }: { ledger: Ledger | undefined; long?: boolean }) {
  const taken = ledger?.taken ?? 0;
  if (!ledger || taken === 0) return <span class="dim">no samples yet</span>;
  const delivered = ledger.delivered ?? 0;
  const pending = ledger.pending ?? 0;
  const lost = lostOf(ledger);
  const part = (count: number) => ({ width: `${(100 * count) / taken}%` });
  return (
    <div class="ledger">
      <div class="ledger-bar" role="img" aria-label={`${integer(taken)} samples taken: ${integer(delivered)} delivered, ${integer(pending)} pending, ${integer(lost)} lost`}>
        <i class="delivered" style={part(delivered)} />
        <i class="pending" style={part(pending)} />
        <i class="lost" style={part(lost)} />
      </div>
      <div class="ledger-words">
        {long ? (
          <>
            <b>{integer(taken)}</b> taken = <b class="delivered">{integer(delivered)}</b> delivered + <b class="pending">{integer(pending)}</b> pending + <b class="lost">{integer(lost)}</b> lost
          </>
        ) : (
          <>
            {compact(taken)} taken{lost > 0 ? <> · <b class="lost">{compact(lost)} lost</b></> : " · none lost"}
          </>
        )}
      </div>
    </div>
  );
}

function Details({ node, now }: { node: FleetNode; now: number }) {
  const lost = Object.entries(node.ledger?.lost ?? {}).sort((a, b) => b[1] - a[1]);
  return (
    <div class="node-details">
      <section>
        <h3>Rules on this node</h3>
        {(node.rules ?? []).length === 0 ? (
          <p class="dim">None.</p>
        ) : (
          <table class="list">
            <thead>
              <tr>
                <th scope="col">Rule</th>
                <th scope="col">State</th>
                <th scope="col" class="number">Processes</th>
                <th scope="col" class="number">Samples</th>
                <th scope="col">Last sample</th>
                <th scope="col">Expires</th>
              </tr>
            </thead>
            <tbody>
              {(node.rules ?? []).map((rule) => (
                <tr key={rule.rule_id}>
                  <th scope="row">{rule.rule_id}</th>
                  <td>
                    <StateBadge state={rule.state} />
                    {rule.reason && <div class="dim">{rule.reason}</div>}
                  </td>
                  <td class="number">{integer(rule.processes ?? 0)}</td>
                  <td class="number">{integer(rule.samples ?? 0)}</td>
                  <td class="nowrap">{rule.last_sample_ms ? ago(rule.last_sample_ms, now) : "—"}</td>
                  <td class="nowrap">
                    {!rule.expires_at_ms ? "never" : rule.expires_at_ms > now ? `in ${duration(rule.expires_at_ms - now)}` : ago(rule.expires_at_ms, now)}
                  </td>
                </tr>
              ))}
            </tbody>
          </table>
        )}
        {(node.rollout?.errors ?? []).length > 0 && (
          <>
            <h3>What it says about revision {node.rollout?.revision ?? ""}</h3>
            <Errors errors={node.rollout?.errors} />
          </>
        )}
      </section>
      <section>
        <h3>Every sample accounted for</h3>
        <LedgerBar ledger={node.ledger} long />
        {lost.length > 0 && (
          <dl class="pairs">
            {lost.map(([reason, count]) => (
              <div key={reason}>
                <dt>{REASONS[reason] ?? reason}</dt>
                <dd>
                  {integer(count)} <span class="dim">{share(count, node.ledger?.taken ?? 0)}</span>
                </dd>
              </div>
            ))}
          </dl>
        )}
        <h3>Agent</h3>
        <dl class="pairs">
          <div><dt>clock ticks seen</dt><dd>{integer(node.ledger?.ticks ?? 0)}</dd></div>
          <div><dt>processes armed</dt><dd>{integer(node.processes_armed ?? 0)}</dd></div>
          <div><dt>spool</dt><dd>{bytes(node.spool_bytes ?? 0)}</dd></div>
          <div><dt>last heard</dt><dd title={node.last_seen_ms ? moment(node.last_seen_ms) : ""}>{node.last_seen_ms ? ago(node.last_seen_ms, now) : "—"}</dd></div>
          <div><dt>active revision</dt><dd>{node.active_revision ?? 0}</dd></div>
        </dl>
        {(node.degraded ?? []).length > 0 && (
          <>
            <h3>Missing here</h3>
            <ul class="errors">{node.degraded?.map((line) => <li key={line}>{line}</li>)}</ul>
          </>
        )}
        {(node.features ?? []).length > 0 && (
          <p class="features">{node.features?.map((feature) => <span class="label-pair" key={feature}>{feature}</span>)}</p>
        )}
      </section>
    </div>
  );
}

export function Nodes({ tick }: { tick: number }) {
  const load = useLoad<{ nodes?: FleetNode[] }>(`nodes ${tick}`, (signal) => get("nodes", {}, signal));
  const [filter, setFilter] = useState("");
  const [open, setOpen] = useState<Set<string>>(new Set());
  const now = Date.now();
  const nodes = load.data?.nodes ?? [];

  if (load.error) return <main class="page"><h1>Nodes</h1><Problem error={load.error} /></main>;
  if (load.data && nodes.length === 0) {
    return (
      <main class="page">
        <h1>Nodes</h1>
        <section class="empty">
          <h2>No node has connected yet</h2>
          <p>Agents dial the collector; nothing has to be opened on the nodes.</p>
          <Steps agent rules={false} />
        </section>
      </main>
    );
  }
  const sum: Required<Pick<Ledger, "taken" | "delivered" | "pending">> & Ledger = { taken: 0, delivered: 0, pending: 0, lost: {} };
  for (const { ledger } of nodes) {
    sum.taken += ledger?.taken ?? 0;
    sum.delivered += ledger?.delivered ?? 0;
    sum.pending += ledger?.pending ?? 0;
    for (const [reason, count] of Object.entries(ledger?.lost ?? {})) sum.lost = { ...sum.lost, [reason]: (sum.lost?.[reason] ?? 0) + count };
  }
  const connected = nodes.filter((node) => node.connected).length;
  const wanted = filter.toLowerCase();
  const shown = nodes.filter((node) =>
    [node.name, node.version, node.kernel, node.rollout?.state, node.connected ? "connected" : "offline"].some((text) => text?.toLowerCase().includes(wanted)),
  );
  const toggle = (name: string) => {
    const next = new Set(open);
    if (!next.delete(name)) next.add(name);
    setOpen(next);
  };
  return (
    <main class="page">
      <h1>Nodes</h1>
      <section class="summary" aria-label="The whole fleet">
        <div class="fact"><span>connected</span><b>{connected}<small> of {nodes.length}</small></b></div>
        <div class="fact"><span>newest revision</span><b class="small">{tally(nodes.map((node) => node.rollout?.state ?? "")) || "—"}</b></div>
        <div class="fact"><span>processes armed</span><b>{integer(nodes.reduce((count, node) => count + (node.processes_armed ?? 0), 0))}</b></div>
        <div class="fact wide"><span>samples</span><LedgerBar ledger={sum} long /></div>
      </section>
      <input class="field filter" type="search" placeholder="Filter by name, kernel, version, state" aria-label="Filter the nodes" value={filter} onInput={(event) => setFilter(event.currentTarget.value)} />
      <div class="table-box" tabIndex={0} role="region" aria-label="Nodes">
        <table class="list nodes">
          <thead>
            <tr>
              <th scope="col">Node</th>
              <th scope="col">Agent</th>
              <th scope="col">Kernel</th>
              <th scope="col" class="number">CPU</th>
              <th scope="col" class="number">Memory</th>
              <th scope="col">Samples</th>
              <th scope="col">Rules</th>
            </tr>
          </thead>
          <tbody>
            {shown.map((node) => {
              const alive = ((node.last_seen_ms ?? 0) - (node.started_at_ms ?? 0)) / 1000;
              const isOpen = open.has(node.name);
              return (
                <>
                  <tr key={node.name} class={isOpen ? "open" : ""}>
                    <th scope="row">
                      <button type="button" class="expand" aria-expanded={isOpen} onClick={() => toggle(node.name)}>
                        <span class="chevron" aria-hidden="true" />
                        <span class={`dot ${node.connected ? ((node.degraded ?? []).length > 0 ? "warn" : "ok") : "bad"}`} aria-hidden="true" />
                        {node.name}
                      </button>
                      <div class="dim under">
                        {node.connected ? "connected" : "offline"} {node.since_ms ? ago(node.since_ms, now) : ""}
                        {(node.degraded ?? []).length > 0 && " · degraded"}
                      </div>
                    </th>
                    <td>{node.version || "—"}</td>
                    <td>
                      {node.kernel || "—"}
                      <div class="dim">{[node.arch, node.cpus ? `${node.cpus} CPUs` : ""].filter(Boolean).join(" · ")}</div>
                    </td>
                    <td class="number">
                      {node.started_at_ms && alive > 0 ? `${((100 * (node.cpu_seconds ?? 0)) / alive).toFixed(2)}%` : "—"}
                      <div class="dim" title={node.started_at_ms ? `since ${moment(node.started_at_ms)}` : ""}>{duration((node.cpu_seconds ?? 0) * 1000)} in all</div>
                    </td>
                    <td class="number">{bytes(node.rss_bytes ?? 0)}</td>
                    <td class="wide"><LedgerBar ledger={node.ledger} /></td>
                    <td>
                      {node.rollout ? <StateBadge state={node.rollout.state} /> : <span class="dim">—</span>}
                      <div class="dim">
                        {node.rollout?.revision ? `revision ${node.rollout.revision}` : ""}
                        {node.rollout?.took_ms !== undefined ? ` · ${took(node.rollout.took_ms)}` : ""}
                      </div>
                    </td>
                  </tr>
                  {isOpen && (
                    <tr class="details" key={`${node.name} details`}>
                      <td colSpan={7}><Details node={node} now={now} /></td>
                    </tr>
                  )}
                </>
              );
            })}
          </tbody>
        </table>
        {shown.length === 0 && load.data && <p class="dim none">No node fits the filter.</p>}
      </div>
    </main>
  );
}
