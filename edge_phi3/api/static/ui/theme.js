// Loaded before the first paint, and as a plain script, so that the page never shows in the other scheme first.
{
  let chosen = null;
  try {
    chosen = localStorage.getItem("edge-phi3.theme");
  } catch {
    // A browser that keeps nothing for this page: the system's scheme it is.
  }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
}
