/** A flame graph with its path, its search result and the facts of the picked frame. */
import { useRef } from "preact/hooks";
import { integer, share } from "../units";
import { Facts, describe } from "./Facts";
import { type FlameProps, type FlameState, useFlame } from "./useFlame";
import { useFlameKeys } from "./useFlameKeys";

/** Buttons for the frames from the root to the zoomed one. */
function Crumbs({ flame: { path, visit }, whole }: { flame: FlameState; whole: string }) {
  // A deep path shows its first frame and its last four.
  const crumbs = path.length > 6 ? [path[0], undefined, ...path.slice(-4)] : path;
  return (
    <nav class="crumbs" aria-label="Zoomed frame">
      <ol>
        {crumbs.map((node, at) =>
          node ? (
            <li key={node.data.key}>
              <button type="button" onClick={() => visit(node)} aria-current={at === crumbs.length - 1 ? "true" : undefined} title={node.data.name}>
                {node.depth === 0 ? whole : node.data.name}
              </button>
            </li>
          ) : (
            <li key="gap" class="gap">…</li>
          ),
        )}
      </ol>
      {path.length > 1 && (
        <button type="button" class="quiet" onClick={() => visit(path[0])}>
          Reset zoom <kbd>Esc</kbd>
        </button>
      )}
    </nav>
  );
}

/** Result of the search, or the number of frames that are too narrow to see. */
function Found({ frames, matches, flame }: Pick<FlameProps, "frames" | "matches"> & { flame: FlameState }) {
  const { found, nodes, path } = flame;
  return (
    <div class="found" role="status">
      {matches?.error !== undefined && <span class="bad">{matches.error}</span>}
      {!found && nodes.length < frames.count && path.length <= 1 && (
        <span>{integer(nodes.length)} of {integer(frames.count)} frames are wide enough to see; zoom in for the others</span>
      )}
      {found && matches?.error === undefined && (
        found.count === 0 ? (
          <span>No frame matches</span>
        ) : (
          <span>
            <b>{found.count}</b> {found.count === 1 ? "frame" : "frames"} · <b>{share(found.part, frames.total)}</b>
            {frames.diff && <> (base {share(found.base, frames.baseTotal)})</>} matched
          </span>
        )
      )}
    </div>
  );
}

/** The picked frame, or a hint about the keys. */
function Picked({ frames, part, id, onFunction, flame: { picked } }: FlameProps & { id: string; flame: FlameState }) {
  return (
    <>
      <div class="picked" id={id}>
        {picked ? (
          <>
            <div class="picked-facts"><Facts frame={picked} frames={frames} hasSelf={part !== "callers"} /></div>
            <div class="picked-tools">
              {!picked.special && <button type="button" class="quiet" onClick={() => onFunction(picked)}>Callers and callees <kbd>s</kbd></button>}
              <button type="button" class="quiet" onClick={() => void navigator.clipboard?.writeText(picked.name)}>Copy name</button>
            </div>
          </>
        ) : (
          <span class="dim hint">
            <kbd>↑</kbd> <kbd>↓</kbd> <kbd>←</kbd> <kbd>→</kbd> move · <kbd>Enter</kbd> or click zooms · <kbd>Esc</kbd> resets · <kbd>/</kbd> searches
          </span>
        )}
      </div>
      <div class="visually-hidden" role="status">{picked ? describe({ frame: picked, frames, hasSelf: part !== "callers" }) : ""}</div>
    </>
  );
}

/** Moves the tooltip beside the pointer, inside the window. */
function placeTip(box: HTMLElement | null, event: PointerEvent) {
  if (!box) return;
  const { offsetWidth, offsetHeight } = box;
  const left = Math.min(event.clientX + 14, innerWidth - offsetWidth - 8);
  const top = event.clientY + 18 + offsetHeight > innerHeight ? event.clientY - offsetHeight - 10 : event.clientY + 18;
  box.style.left = `${Math.max(8, left)}px`;
  box.style.top = `${Math.max(8, top)}px`;
}

export function Flame(props: FlameProps) {
  const { frames, part } = props;
  const flame = useFlame(props);
  const id = part ? `picked-${part}` : "picked-frame";
  const onKeyDown = useFlameKeys(props, flame);
  const tip = useRef<HTMLDivElement>(null);
  return (
    <div class={`flame${frames.diff ? " diff" : ""}${part ? ` ${part}` : ""}`}>
      <div class="flame-head">
        {props.title && <h3>{props.title}</h3>}
        {(!part || flame.path.length > 1) && <Crumbs flame={flame} whole={part === "callers" || part === "callees" ? frames.data(0).name : "all"} />}
        <Found frames={frames} matches={props.matches} flame={flame} />
      </div>
      <div
        class="flame-graph"
        tabIndex={0}
        role="application"
        aria-roledescription="flame graph"
        aria-label={`Flame graph of ${frames.count} ${part === "callers" || part === "callees" ? part : "frames"}${part === "base" || part === "comparison" ? ` of the ${part}` : ""}. Arrow keys move, Enter zooms in, Escape resets, slash searches, n goes to the next match.`}
        aria-describedby={id}
        ref={flame.host}
        onKeyDown={onKeyDown}
        onPointerMove={(event) => placeTip(tip.current, event)}
        {...flame.handlers}
      />
      <Picked {...props} id={id} flame={flame} />
      <div class={`tip${flame.hovered ? " on" : ""}`} ref={tip} aria-hidden="true">
        {flame.hovered && <Facts frame={flame.hovered} frames={frames} hasSelf={part !== "callers"} />}
      </div>
    </div>
  );
}
