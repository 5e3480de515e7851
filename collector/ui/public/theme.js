// Sets the colour scheme that the reader chose, before the first paint. Without a choice the style sheet follows the system.
try {
  const theme = localStorage.getItem("gannet-theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Without permission for storage, the scheme of the system applies.
}
