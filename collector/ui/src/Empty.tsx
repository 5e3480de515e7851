/** What a newcomer reads where there is nothing to draw yet: the next command, ready to be copied. */
import { Command } from "./parts/parts";

const RULES = `cat > rules.yaml <<'END'
rules:
  - id: first
    description: every Python and Node.js process on this machine
    match: {comm: ["python3*", "node*"]}
    capture: {hz: 19}
    lifetime: {ttl: 1h}
END`;

const host = () => (location.hostname.includes(":") ? `[${location.hostname.replace(/[[\]]/g, "")}]` : location.hostname);

/** The agents' port of the collector that serves this page, as it is unless it was told otherwise. */
const collector = () => `http://${host()}:4100`;

export function Steps({ agent, rules }: { agent: boolean; rules: boolean }) {
  return (
    <ol class="steps">
      {agent && (
        <li>
          <h3>Connect a node</h3>
          <p>On the machine to watch, as root:</p>
          <Command text={`sudo gannet-agent run --endpoint ${collector()}`} />
        </li>
      )}
      {rules && (
        <li>
          <h3>Say what to profile</h3>
          <p>A rule names processes; every connected node takes it within moments and answers.</p>
          <Command text={RULES} />
          <Command text={`gannetctl --collector ${collector()} rules apply -f rules.yaml`} />
        </li>
      )}
      <li>
        <h3>Is the collector inside a cluster?</h3>
        <p>Bring its ports here first, then use the commands above as they are:</p>
        <Command text="kubectl port-forward service/gannet-collector 4100 4180" />
      </li>
    </ol>
  );
}

export function Welcome() {
  return (
    <section class="empty" aria-labelledby="empty-title">
      <h2 id="empty-title">No profiles yet</h2>
      <p>
        The collector is running and its store is empty. Profiles appear here about ten seconds after the first process is
        sampled.
      </p>
      <Steps agent rules />
    </section>
  );
}
