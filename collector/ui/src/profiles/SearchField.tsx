/** The search for functions. The key `/` focuses it from anywhere on the page. */
import { useRef } from "preact/hooks";
import { usePageKey, useTyped } from "../parts/hooks";
import { type State, go } from "../state";

export function SearchField({ state }: { state: State }) {
  const field = useRef<HTMLInputElement>(null);
  const [typed, setTyped] = useTyped(state.search, 150, (search) => go({ search }, true));
  usePageKey("/", () => {
    field.current?.focus();
    field.current?.select();
  });
  return (
    <div class="search">
      <input
        ref={field}
        class="field"
        type="search"
        aria-label="Search functions: part of a name, a whole name in quotes, or a /pattern/"
        placeholder="Search functions"
        title={'Part of a name, "a whole name", or /a pattern/'}
        spellcheck={false}
        value={typed}
        onInput={(event) => setTyped(event.currentTarget.value)}
        onKeyDown={(event) => {
          if (event.key === "Escape") {
            event.preventDefault();
            setTyped("");
          } else if (event.key === "Enter") {
            go({ search: typed }, true);
            document.querySelector<HTMLElement>(".flame-graph")?.focus();
          }
        }}
      />
      <kbd aria-hidden="true">/</kbd>
    </div>
  );
}
