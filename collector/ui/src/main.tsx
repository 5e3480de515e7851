import { render } from "preact";
import { useEffect } from "preact/hooks";
import { Nodes } from "./nodes/Nodes";
import { useTick } from "./parts/hooks";
import { KeyHelp } from "./parts/KeyHelp";
import { Toggle } from "./parts/parts";
import { Profiles } from "./profiles/Profiles";
import { Rules } from "./Rules";
import { DEFAULTS, type State, type View, go, toAddress, useAddress } from "./state";
import { NEXT, useTheme } from "./theme";
import { isRelative } from "./time";
import "./style.css";

const VIEWS: [View, string][] = [["profiles", "Profiles"], ["nodes", "Nodes"], ["rules", "Rules"]];
const REFRESH_SECONDS = 10;

/** Follows a link within the page without a reload. With a modifier key the browser follows it. */
function inside(event: MouseEvent, change: Partial<State>) {
  if (event.ctrlKey || event.metaKey || event.shiftKey || event.button !== 0) return;
  event.preventDefault();
  go(change);
}

function App() {
  const state = useAddress();
  const [theme, dark, nextTheme] = useTheme(state.theme);
  // Nodes and rules are always current. Profiles change only if the range ends now.
  const canRefresh = state.view !== "profiles" || isRelative(state.until);
  const [tick, refresh] = useTick(state.live && canRefresh, state.view === "profiles" ? REFRESH_SECONDS : REFRESH_SECONDS / 2);
  useEffect(() => {
    document.title = `${VIEWS.find(([view]) => view === state.view)?.[1] ?? ""} · Gannet`;
  }, [state.view]);
  return (
    <>
      <a class="skip" href="#content" onClick={(event) => {
        event.preventDefault();
        document.getElementById("content")?.focus();
      }}>Skip to the content</a>
      <header class="top-bar">
        <a class="brand" href="./" onClick={(event) => inside(event, { ...DEFAULTS, theme: state.theme })}>
          <img src="./icon.svg" alt="" width="26" height="26" />
          <span>Gannet</span>
        </a>
        <nav aria-label="Views">
          {VIEWS.map(([view, name]) => (
            <a key={view} href={toAddress({ ...state, view })} aria-current={state.view === view ? "page" : undefined} onClick={(event) => inside(event, { view })}>
              {name}
            </a>
          ))}
        </nav>
        <div class="top-tools">
          <button type="button" class="icon" onClick={refresh} aria-label="Refresh now" title="Refresh now">
            <svg viewBox="0 0 16 16" width="16" height="16" aria-hidden="true"><path d="M13.5 8A5.5 5.5 0 1 1 11.9 4.1M13.5 1.8V5H10.3" fill="none" stroke="currentColor" stroke-width="1.5" stroke-linecap="round" stroke-linejoin="round" /></svg>
          </button>
          <Toggle name="Auto-refresh" title={canRefresh ? `Every ${state.view === "profiles" ? REFRESH_SECONDS : REFRESH_SECONDS / 2} seconds` : "Needs a time range that ends now"} on={state.live} onChange={(live) => go({ live }, true)} />
          <button type="button" class="icon" onClick={nextTheme} aria-label={`Colour scheme: ${theme}. Change to ${NEXT[theme]}`} title={`Colour scheme: ${theme}`}>
            <svg viewBox="0 0 16 16" width="16" height="16" aria-hidden="true">
              <circle cx="8" cy="8" r="5.5" fill="none" stroke="currentColor" stroke-width="1.5" />
              <path d={theme === "auto" ? "M8 2.5a5.5 5.5 0 0 1 0 11z" : theme === "dark" ? "M8 2.5a5.5 5.5 0 0 1 0 11a5.5 5.5 0 0 1 0-11z" : ""} fill="currentColor" />
            </svg>
          </button>
          <KeyHelp />
        </div>
      </header>
      <div id="content" tabIndex={-1}>
        {state.view === "profiles" && <Profiles state={state} tick={tick} dark={dark} />}
        {state.view === "nodes" && <Nodes tick={tick} filter={state.nodes} />}
        {state.view === "rules" && <Rules tick={tick} />}
      </div>
      <footer>
        <a href="./third-party.txt">Licences of the bundled packages</a>
      </footer>
    </>
  );
}

const app = document.getElementById("app");
if (app) render(<App />, app);
