/** The sandwich view of one function: its callers above, its callees below, both on one scale. */
import { useMemo } from "preact/hooks";
import { Flame } from "../flame/Flame";
import { type Frames, frames } from "../flame/frames";
import { sandwich } from "../flame/sandwich";
import type { FlameProps } from "../flame/useFlame";
import { useSliced } from "../parts/sliced";
import type { State } from "../state";
import { share, value } from "../units";

interface Parts {
  callers: Frames;
  callees: Frames;
  self: number;
}

/** Sums up the function and prepares both graphs; `undefined` until then, and `null` if no frame is the function. */
function useParts(drawn: Frames, state: State): Parts | null | undefined {
  const { fn, fnFile, colour, absolute } = state;
  const focus = useMemo(
    () => drawn.tree.names.map(({ name, file }) => name === fn && (fnFile === "" || file === fnFile)),
    [drawn.tree.names, fn, fnFile],
  );
  const { value: parts } = useSliced<Parts | null>(
    function* () {
      const built = yield* sandwich(drawn.tree, focus);
      if (!built) return null;
      const options = { unit: drawn.unit, total: drawn.total, baseTotal: drawn.baseTotal, diff: drawn.diff, colour, absolute, hues: drawn.hues };
      const callers = yield* frames(built.callers, { ...options, part: "callers" });
      const callees = yield* frames(built.callees, { ...options, part: "callees" });
      const self = drawn.tree.self.reduce((sum, own, at) => (focus[drawn.tree.frame[at] as number] ? sum + own : sum), 0);
      return { callers, callees, self };
    },
    [drawn, focus],
  );
  return parts;
}

/** `graph`: the properties of the main graph, of which both parts are made. */
export function Sandwich({ state, graph }: { state: State; graph: FlameProps }) {
  const drawn = graph.frames;
  const parts = useParts(drawn, state);
  if (state.fn === "") {
    return <p class="dim none">Choose a function in the table, or press <kbd>s</kbd> on a frame of the graph. Its callers and callees appear here.</p>;
  }
  if (parts === undefined) return <p class="dim none">Loading…</p>;
  if (parts === null) {
    return (
      <p class="dim none">
        <code>{state.fn}</code> is in no stack of this selection. Choose another function, or a longer range.
      </p>
    );
  }
  const { callers, callees, self } = parts;
  const { name, file, total } = callees.data(0);
  return (
    <section class="sandwich" aria-label={`Callers and callees of ${name}`}>
      <header>
        <h2>{name}</h2>
        <span class="dim">
          {file && `${file} · `}total {value(total, drawn.unit)} {share(total, drawn.total)} · self {value(self, drawn.unit)} {share(self, drawn.total)}
        </span>
      </header>
      <Flame {...graph} frames={callers} part="callers" title="Callers" flip />
      <Flame {...graph} frames={callees} part="callees" title="Callees" flip={false} />
    </section>
  );
}
