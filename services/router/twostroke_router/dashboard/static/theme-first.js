// Runs before the first paint, so that a chosen theme never flashes through the other one.
(() => {
  let theme = null;
  try {
    theme = localStorage.getItem("twostroke-theme");
  } catch {
    // Storage is closed to this page: the system's theme it is.
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();
