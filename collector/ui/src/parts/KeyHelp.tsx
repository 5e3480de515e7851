/** Help for the keyboard, in a dialog that the key `?` opens. */
import { useRef } from "preact/hooks";
import { usePageKey } from "./hooks";

const KEYS: [where: string, keys: [keys: string[], what: string][]][] = [
  ["Anywhere", [
    [["?"], "this help"],
    [["/"], "search functions"],
    [["f"], "filters"],
    [["Esc"], "close a box, or undo a step"],
  ]],
  ["Graph", [
    [["↑", "↓", "←", "→"], "move among frames"],
    [["Enter"], "zoom to the frame"],
    [["Backspace"], "zoom out by one frame"],
    [["Esc"], "reset the zoom, then the search"],
    [["Home"], "go to the root"],
    [["n", "N"], "next or previous match of the search"],
    [["s"], "callers and callees of the frame"],
  ]],
  ["Table of functions", [
    [["↑", "↓"], "move among functions"],
    [["Enter"], "choose the function"],
    [["Home", "End"], "first or last function"],
  ]],
  ["Timeline and heat map", [
    [["←", "→"], "read the values"],
    [["Shift + ←", "Shift + →"], "pick a range"],
    [["↑", "↓"], "move among rows of a heat map"],
    [["Enter"], "select the row of a label"],
    [["Esc"], "clear the picked range"],
  ]],
];

export function KeyHelp() {
  const dialog = useRef<HTMLDialogElement>(null);
  const open = () => dialog.current?.showModal();
  usePageKey("?", open);
  return (
    <>
      <button type="button" class="icon" onClick={open} aria-label="Keyboard help" title="Keyboard help (?)">?</button>
      <dialog ref={dialog} class="keys" aria-labelledby="keys-title" onClick={(event) => event.target === dialog.current && dialog.current?.close()}>
        <div>
          <div class="keys-head">
            <h2 id="keys-title">Keys</h2>
            <button type="button" class="icon" aria-label="Close" onClick={() => dialog.current?.close()}>✕</button>
          </div>
          <div class="keys-groups">
            {KEYS.map(([where, keys]) => (
              <section key={where}>
                <h3>{where}</h3>
                <dl>
                  {keys.map(([names, what]) => (
                    <div key={what}>
                      <dt>{names.map((name) => <kbd key={name}>{name}</kbd>)}</dt>
                      <dd>{what}</dd>
                    </div>
                  ))}
                </dl>
              </section>
            ))}
          </div>
        </div>
      </dialog>
    </>
  );
}
