// Draws the formulas of a page, each time that the theme puts one on the screen.
document$.subscribe(function () {
  document.querySelectorAll(".arithmatex:not([data-drawn])").forEach(function (place) {
    // pymdownx.arithmatex writes \(...\) and \[...\].
    var source = place.textContent.trim();
    place.setAttribute("data-drawn", "");
    try {
      katex.render(source.slice(2, -2), place, { displayMode: source.startsWith("\\[") });
    } catch (error) {
      place.textContent = source; // as it was written: scripts/check_site.py finds it
      console.error(error.message);
    }
  });
});
