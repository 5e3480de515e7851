/** Details of one node: its rules, where its samples went, and its agent. */
import type { FleetNode } from "../api";
import { Errors, StateBadge } from "../rollout";
import { ago, bytes, duration, integer, moment, share } from "../units";
import { LedgerBar } from "./LedgerBar";

/** Descriptions of the loss reasons; others appear by their names. */
const REASONS: Record<string, string> = {
  ring_full: "kernel ring buffer full",
  stack_fault: "stack could not be read",
  stack_missing: "unwinder could not go on",
  map_full: "kernel map full",
  rate_limit: "rate limit of off-CPU samples",
  skipped: "kernel skipped the handler",
  undecodable: "record not readable",
  no_rule: "no rule for the whole interval",
  capture_over: "capture was over",
  rule_removed: "rule removed",
  queue_full: "agent queue full",
  denied: "pod opts out",
  spool_full: "spool full",
  spool_corrupt: "spool damaged",
  refused: "refused by the collector",
  expired: "too old to send",
  too_large: "profile too large",
  shutdown: "agent stopped",
};

interface DetailsProps {
  node: FleetNode;
  now: number;
}

function NodeRules({ node, now }: DetailsProps) {
  return (
    <section>
      <h2>Rules on this node</h2>
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
          <h2>Errors of revision {node.rollout?.revision ?? ""}</h2>
          <Errors errors={node.rollout?.errors} />
        </>
      )}
    </section>
  );
}

function NodeAgent({ node, now }: DetailsProps) {
  const lost = Object.entries(node.ledger?.lost ?? {}).sort((a, b) => b[1] - a[1]);
  return (
    <section>
      <h2>Every sample accounted for</h2>
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
      <h2>Agent</h2>
      <dl class="pairs">
        <div><dt>clock ticks seen</dt><dd>{integer(node.ledger?.ticks ?? 0)}</dd></div>
        <div><dt>processes sampled</dt><dd>{integer(node.processes_armed ?? 0)}</dd></div>
        <div><dt>spool</dt><dd>{bytes(node.spool_bytes ?? 0)}</dd></div>
        <div><dt>last seen</dt><dd title={node.last_seen_ms ? moment(node.last_seen_ms) : ""}>{node.last_seen_ms ? ago(node.last_seen_ms, now) : "—"}</dd></div>
        <div><dt>active revision</dt><dd>{node.active_revision ?? 0}</dd></div>
      </dl>
      {(node.degraded ?? []).length > 0 && (
        <>
          <h2>Unavailable features</h2>
          <ul class="errors">{node.degraded?.map((line) => <li key={line}>{line}</li>)}</ul>
        </>
      )}
      {(node.features ?? []).length > 0 && (
        <p class="features">{node.features?.map((feature) => <span class="label-pair" key={feature}>{feature}</span>)}</p>
      )}
    </section>
  );
}

export function Details(props: DetailsProps) {
  return (
    <div class="node-details">
      <NodeRules {...props} />
      <NodeAgent {...props} />
    </div>
  );
}
