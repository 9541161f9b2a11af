// The chosen theme, before the first paint: "light", "dark", or "auto" for the system's own.
(function () {
  let theme = "auto";
  try {
    theme = localStorage.getItem("dspark-theme") || "auto";
  } catch {
    // Storage may be forbidden; the system's theme does.
  }
  document.documentElement.dataset.theme = theme;
})();
