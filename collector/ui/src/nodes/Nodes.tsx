/** The fleet: the state of each node, the cost of its agent, its lost samples, and its rules. */
import { useState } from "preact/hooks";
import { type FleetNode, type Ledger, get } from "../api";
import { Steps } from "../Empty";
import { useLoad } from "../parts/hooks";
import { Problem } from "../parts/parts";
import { StateBadge, tally } from "../rollout";
import { go } from "../state";
import { ago, bytes, duration, integer, moment, took } from "../units";
import { Details } from "./Details";
import { LedgerBar } from "./LedgerBar";

type Sums = Required<Pick<Ledger, "taken" | "delivered" | "pending" | "unaccounted">> & Ledger;

function sumLedgers(nodes: FleetNode[]): Sums {
  const sum: Sums = { taken: 0, delivered: 0, pending: 0, unaccounted: 0, lost: {} };
  for (const { ledger } of nodes) {
    sum.taken += ledger?.taken ?? 0;
    sum.delivered += ledger?.delivered ?? 0;
    sum.pending += ledger?.pending ?? 0;
    sum.unaccounted += ledger?.unaccounted ?? 0;
    for (const [reason, count] of Object.entries(ledger?.lost ?? {})) sum.lost = { ...sum.lost, [reason]: (sum.lost?.[reason] ?? 0) + count };
  }
  return sum;
}

function Summary({ nodes }: { nodes: FleetNode[] }) {
  const connected = nodes.filter((node) => node.connected).length;
  return (
    <section class="summary" aria-label="The whole fleet">
      <div class="fact"><span>connected</span><b>{connected}<small> of {nodes.length}</small></b></div>
      <div class="fact"><span>newest revision</span><b class="small">{tally(nodes.map((node) => node.rollout?.state ?? "")) || "—"}</b></div>
      <div class="fact"><span>processes sampled</span><b>{integer(nodes.reduce((count, node) => count + (node.processes_armed ?? 0), 0))}</b></div>
      <div class="fact wide"><span>samples</span><LedgerBar ledger={sumLedgers(nodes)} long /></div>
    </section>
  );
}

function NodeRow({ node, now, isOpen, onToggle }: { node: FleetNode; now: number; isOpen: boolean; onToggle: () => void }) {
  const alive = ((node.last_seen_ms ?? 0) - (node.started_at_ms ?? 0)) / 1000;
  return (
    <>
      <tr class={isOpen ? "open" : ""}>
        <th scope="row">
          <button type="button" class="expand" aria-expanded={isOpen} onClick={onToggle}>
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
          <div class="dim" title={node.started_at_ms ? `since ${moment(node.started_at_ms)}` : ""}>{duration((node.cpu_seconds ?? 0) * 1000)} in total</div>
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
        <tr class="details">
          <td colSpan={7}><Details node={node} now={now} /></td>
        </tr>
      )}
    </>
  );
}

/** Returns the nodes that match the filter by name, version, kernel or state. */
function matching(nodes: FleetNode[], filter: string): FleetNode[] {
  const wanted = filter.toLowerCase();
  return nodes.filter((node) =>
    [node.name, node.version, node.kernel, node.rollout?.state, node.connected ? "connected" : "offline"].some((text) => text?.toLowerCase().includes(wanted)),
  );
}

function useOpen(): [Set<string>, (name: string) => void] {
  const [open, setOpen] = useState<Set<string>>(new Set());
  const toggle = (name: string) => {
    const next = new Set(open);
    if (!next.delete(name)) next.add(name);
    setOpen(next);
  };
  return [open, toggle];
}

export function Nodes({ tick, filter }: { tick: number; filter: string }) {
  const load = useLoad<{ nodes?: FleetNode[] }>(`nodes ${tick}`, (signal) => get("nodes", {}, signal));
  const [open, toggle] = useOpen();
  const now = Date.now();
  const nodes = load.data?.nodes ?? [];

  if (load.error) return <main class="page"><h1>Nodes</h1><Problem error={load.error} /></main>;
  if (load.data && nodes.length === 0) {
    return (
      <main class="page">
        <h1>Nodes</h1>
        <section class="empty">
          <h2>No node has connected yet</h2>
          <p>Agents connect to the collector, so the nodes need no open port.</p>
          <Steps agent rules={false} />
        </section>
      </main>
    );
  }
  const shown = matching(nodes, filter);
  return (
    <main class="page">
      <h1>Nodes</h1>
      <Summary nodes={nodes} />
      <input class="field filter" type="search" placeholder="Filter by name, kernel, version, state" aria-label="Filter the nodes" value={filter} onInput={(event) => go({ nodes: event.currentTarget.value }, true)} />
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
            {shown.map((node) => (
              <NodeRow key={node.name} node={node} now={now} isOpen={open.has(node.name)} onToggle={() => toggle(node.name)} />
            ))}
          </tbody>
        </table>
        {shown.length === 0 && load.data && <p class="dim none">No node matches the filter.</p>}
      </div>
    </main>
  );
}
