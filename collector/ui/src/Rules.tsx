/** The rules of the collector, and the state of the newest revision on each node. */
import { type RevisionRollout, type Rule, type RuleScope, type RuleScopes, get } from "./api";
import { Steps } from "./Empty";
import { type Load, useLoad } from "./parts/hooks";
import { Command, Problem } from "./parts/parts";
import { Errors, StateBadge, tally } from "./rollout";
import { ago, integer, moment, took } from "./units";
import { toYaml } from "./yaml";

/** Fields of a rule in the order in which people write them. The API sorts them by name. */
const FIELDS = ["match", "nodes", "when", "capture", "lifetime", "labels", "priority"];

function body({ id: _id, description: _description, ...rule }: Rule): string {
  const rank = (name: string) => (FIELDS.indexOf(name) + FIELDS.length + 1) % (FIELDS.length + 1);
  return toYaml(Object.fromEntries(Object.entries(rule).sort(([a], [b]) => rank(a) - rank(b)))).trimEnd();
}

/** A rule as YAML with bold keys. */
function Yaml({ text }: { text: string }) {
  return (
    <pre class="yaml" tabIndex={0}>
      <code>
        {text.split("\n").map((line) => {
          const found = /^(\s*(?:- )?)([\w-]+):(.*)$/.exec(line);
          return found ? (
            <>
              {found[1]}
              <b>{found[2]}</b>:{found[3]}
              {"\n"}
            </>
          ) : (
            `${line}\n`
          );
        })}
      </code>
    </pre>
  );
}

function RolloutPanel({ revision, rollout, now }: { revision: number; rollout: Load<RevisionRollout>; now: number }) {
  const nodes = rollout.data?.nodes ?? [];
  return (
    <section class="panel" aria-labelledby="rollout-title">
      <header class="panel-head">
        <h2 id="rollout-title">Revision {revision}</h2>
        {rollout.data && (
          <span class={`badge ${rollout.data.settled ? "ok" : "busy"}`}>{rollout.data.settled ? "settled" : "rolling out"}</span>
        )}
        <span class="dim">
          {rollout.data?.created_at_ms ? `published ${ago(rollout.data.created_at_ms, now)}` : ""}
          {nodes.length > 0 && ` · ${tally(nodes.map((node) => node.state))}`}
        </span>
      </header>
      {rollout.error && <Problem error={rollout.error} />}
      {nodes.length > 0 ? (
        <div class="table-box" tabIndex={0} role="region" aria-label="Rollout by node">
          <table class="list">
            <thead>
              <tr>
                <th scope="col">Node</th>
                <th scope="col">State</th>
                <th scope="col">Since</th>
                <th scope="col" class="number">Took</th>
                <th scope="col">Errors</th>
              </tr>
            </thead>
            <tbody>
              {nodes.map((node) => (
                <tr key={node.node}>
                  <th scope="row">{node.node}</th>
                  <td><StateBadge state={node.state} /></td>
                  <td class="nowrap">{node.since_ms ? ago(node.since_ms, now) : "—"}</td>
                  <td class="number">{node.took_ms === undefined ? "—" : took(node.took_ms)}</td>
                  <td><Errors errors={node.errors} /></td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      ) : (
        !rollout.error && <p class="dim none">No node has connected yet. Nodes get the rules when they connect.</p>
      )}
    </section>
  );
}

function ScopePanel({ scope, now }: { scope: RuleScope; now: number }) {
  return (
    <section class="panel" aria-label={`Scope ${scope.scope}`}>
      <header class="panel-head">
        <h2>
          <span class="dim">scope</span> {scope.scope}
        </h2>
        <span class="dim">
          {integer(scope.rules?.length ?? 0)} {scope.rules?.length === 1 ? "rule" : "rules"} · revision {scope.revision ?? 0}
          {scope.changed_at_ms ? (
            <span title={moment(scope.changed_at_ms)}> · changed {ago(scope.changed_at_ms, now)}</span>
          ) : null}
          {scope.changed_by && ` by ${scope.changed_by}`}
        </span>
      </header>
      <div class="rules">
        {(scope.rules ?? []).map((rule) => (
          <article class="rule" key={rule.id} aria-label={`Rule ${rule.id}`}>
            <h3>{rule.id}</h3>
            {rule.description && <p>{rule.description}</p>}
            <Yaml text={body(rule)} />
          </article>
        ))}
      </div>
    </section>
  );
}

export function Rules({ tick }: { tick: number }) {
  const rules = useLoad<RuleScopes>(`rules ${tick}`, (signal) => get("rules", {}, signal));
  const rollout = useLoad<RevisionRollout>(`rollout ${tick}`, (signal) => get("rollout", {}, signal));
  const now = Date.now();
  const scopes = (rules.data?.scopes ?? []).filter((scope) => (scope.rules ?? []).length > 0);
  return (
    <main class="page">
      <h1>Rules</h1>
      {rules.error && <Problem error={rules.error} />}
      {!rules.error && rules.data && scopes.length === 0 && (
        <section class="empty">
          <h2>No rules yet</h2>
          <p>A rule says which processes to profile, when, and for how long. Without rules, agents sample nothing.</p>
          <Steps agent={false} rules />
        </section>
      )}
      {scopes.length > 0 && (
        <>
          <RolloutPanel revision={rules.data?.revision ?? 0} rollout={rollout} now={now} />
          {scopes.map((scope) => <ScopePanel key={scope.scope} scope={scope} now={now} />)}
          <section class="panel help">
            <h2>Change rules</h2>
            <p>This page is read-only. Use the command line to change rules and to follow them to the nodes:</p>
            <Command text="gannetctl rules apply -f rules.yaml" />
            <Command text="gannetctl rollout watch" />
          </section>
        </>
      )}
    </main>
  );
}
