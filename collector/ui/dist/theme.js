// Sets the colour scheme that the link or the reader chose, before the first paint. Without a choice the style sheet follows the system.
try {
  const known = (theme) => theme === "light" || theme === "dark";
  const asked = new URLSearchParams(location.search).get("theme");
  const theme = known(asked) ? asked : localStorage.getItem("gannet-theme");
  if (known(theme)) document.documentElement.dataset.theme = theme;
} catch {
  // Without permission for storage, the scheme of the system applies.
}
