/** The flame graph. d3-flame-graph draws, zooms and searches; this component adds keys, accessible names and colours. */
import { useRef } from "preact/hooks";
import { integer, share } from "../units";
import { Facts, describe } from "./Facts";
import { type FlameProps, type FlameState, useFlame } from "./useFlame";
import { useFlameKeys } from "./useFlameKeys";

/** Buttons for the frames from the root to the zoomed one. */
function Crumbs({ flame: { path, visit, root } }: { flame: FlameState }) {
  // A deep path shows its first frame and its last four.
  const crumbs = path.length > 6 ? [path[0], undefined, ...path.slice(-4)] : path;
  return (
    <nav class="crumbs" aria-label="Zoomed frame">
      <ol>
        {crumbs.map((node, at) =>
          node ? (
            <li key={node.data.key}>
              <button type="button" onClick={() => visit(node)} aria-current={at === crumbs.length - 1 ? "true" : undefined} title={node.data.name}>
                {node.depth === 0 ? "all" : node.data.name}
              </button>
            </li>
          ) : (
            <li key="gap" class="gap">…</li>
          ),
        )}
      </ol>
      {path.length > 1 && (
        <button type="button" class="quiet" onClick={() => visit(root())}>
          Reset zoom <kbd>Esc</kbd>
        </button>
      )}
    </nav>
  );
}

/** Result of the search, or the number of frames that are too narrow to see. */
function Found({ frames, diff, flame }: Pick<FlameProps, "frames" | "diff"> & { flame: FlameState }) {
  const { found, patternError, shownCount, path } = flame;
  return (
    <div class="found" role="status">
      {patternError !== undefined && <span class="bad">{patternError}</span>}
      {!found && shownCount < frames.count && path.length <= 1 && (
        <span>{integer(shownCount)} of {integer(frames.count)} frames are wide enough to see; zoom in for the others</span>
      )}
      {found && patternError === undefined && (
        found.count === 0 ? (
          <span>No frame matches</span>
        ) : (
          <span>
            <b>{found.count}</b> {found.count === 1 ? "frame" : "frames"} · <b>{share(found.part, frames.total)}</b>
            {diff && <> (base {share(found.base, frames.baseTotal)})</>} matched
          </span>
        )
      )}
    </div>
  );
}

/** The picked frame, or a hint about the keys. */
function Picked({ frames, diff, flame: { picked } }: Pick<FlameProps, "frames" | "diff"> & { flame: FlameState }) {
  return (
    <>
      <div class="picked" id="picked-frame">
        {picked ? (
          <>
            <div class="picked-facts"><Facts frame={picked} frames={frames} diff={diff} /></div>
            <button type="button" class="quiet" onClick={() => void navigator.clipboard?.writeText(picked.name)}>Copy name</button>
          </>
        ) : (
          <span class="dim hint">
            <kbd>↑</kbd> <kbd>↓</kbd> <kbd>←</kbd> <kbd>→</kbd> move · <kbd>Enter</kbd> or click zooms · <kbd>Esc</kbd> resets · <kbd>/</kbd> searches
          </span>
        )}
      </div>
      <div class="visually-hidden" role="status">{picked ? describe({ frame: picked, frames, diff }) : ""}</div>
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
  const { frames, diff, flip } = props;
  const flame = useFlame(props);
  const onKeyDown = useFlameKeys(props, flame);
  const tip = useRef<HTMLDivElement>(null);
  return (
    <div class={`flame${diff ? " diff" : ""}${flip ? "" : " down"}`}>
      <div class="flame-head">
        <Crumbs flame={flame} />
        <Found frames={frames} diff={diff} flame={flame} />
      </div>
      <div
        class="flame-graph"
        tabIndex={0}
        role="application"
        aria-roledescription="flame graph"
        aria-label={`Flame graph of ${frames.count} frames. Arrow keys move, Enter zooms in, Escape resets, slash searches, n goes to the next match.`}
        aria-describedby="picked-frame"
        ref={flame.host}
        onKeyDown={onKeyDown}
        onPointerMove={(event) => placeTip(tip.current, event)}
      />
      <Picked frames={frames} diff={diff} flame={flame} />
      <div class={`tip${flame.hovered ? " on" : ""}`} ref={tip} aria-hidden="true">
        {flame.hovered && <Facts frame={flame.hovered} frames={frames} diff={diff} />}
      </div>
    </div>
  );
}
