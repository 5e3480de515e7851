// Before the first paint: the scheme that this reader chose, if any; without one the style sheet follows the system.
try {
  const theme = localStorage.getItem("gannet-theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage may be forbidden; the system's scheme it is.
}
