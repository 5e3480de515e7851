/** The colour scheme: that of the link, else the reader's own choice, else that of the system. */
import { useEffect, useLayoutEffect, useState } from "preact/hooks";
import { type Theme, go } from "./state";

const KEY = "gannet-theme";
export const NEXT: Record<Theme, Theme> = { auto: "light", light: "dark", dark: "auto" };

function stored(): Theme {
  try {
    const theme = localStorage.getItem(KEY);
    return theme === "light" || theme === "dark" ? theme : "auto";
  } catch {
    return "auto";
  }
}

function store(theme: Theme) {
  try {
    localStorage.setItem(KEY, theme);
  } catch {
    // Without storage the choice lasts as long as the address.
  }
}

/** Returns the chosen scheme, whether it is dark now, and a function that chooses the next one for this and later visits. */
export function useTheme(asked: Theme): [Theme, boolean, () => void] {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const [own, setOwn] = useState(stored);
  const [systemDark, setSystemDark] = useState(system.matches);
  useEffect(() => {
    const follow = () => setSystemDark(system.matches);
    system.addEventListener("change", follow);
    return () => system.removeEventListener("change", follow);
  }, []);
  const theme = asked === "auto" ? own : asked;
  // Before the paint of the graph, whose colours change with the scheme.
  useLayoutEffect(() => {
    if (theme === "auto") delete document.documentElement.dataset["theme"];
    else document.documentElement.dataset["theme"] = theme;
  }, [theme]);
  const next = () => {
    const chosen = NEXT[theme];
    store(chosen);
    setOwn(chosen);
    go({ theme: chosen }, true);
  };
  return [theme, theme === "auto" ? systemDark : theme === "dark", next];
}
