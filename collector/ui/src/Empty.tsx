/** Help for an empty collector: the next commands, ready to copy. */
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

/** Returns the default gRPC address of the collector that serves this page. */
const collector = () => `http://${host()}:4100`;

export function Steps({ agent, rules }: { agent: boolean; rules: boolean }) {
  return (
    <ol class="steps">
      {agent && (
        <li>
          <h3>Connect a node</h3>
          <p>On the machine to profile, as root:</p>
          <Command text={`sudo gannet-agent run --endpoint ${collector()}`} />
        </li>
      )}
      {rules && (
        <li>
          <h3>Choose what to profile</h3>
          <p>A rule selects processes. Every connected node applies it within moments and reports the result.</p>
          <Command text={RULES} />
          <Command text={`gannetctl --endpoint ${collector()} rules apply -f rules.yaml`} />
        </li>
      )}
      <li>
        <h3>Does the collector run in a cluster?</h3>
        <p>Forward its ports first, then use the commands above:</p>
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
        The collector is running and its store is empty. Profiles appear here about ten seconds after an agent samples the
        first process.
      </p>
      <Steps agent rules />
    </section>
  );
}
