// What does not fit scrolls in its own box. A keyboard can reach that box, and it fades where there is more.
(() => {
  const boxes =
    "div.math mjx-container, span.math.wide, div.highlight pre, div.output pre, .pst-scrollable-table-container";

  const fade = (box) =>
    box.classList.toggle("more", box.tabIndex === 0 && box.scrollLeft + box.clientWidth < box.scrollWidth - 1);

  function fit() {
    const inline = document.querySelectorAll("article span.math:not(td *, th *)"); // a table scrolls as a whole
    inline.forEach((formula) => {
      formula.classList.remove("wide", "more"); // it may fit now: a phone was turned
      formula.removeAttribute("tabindex");
    });
    const wide = [...inline].filter((formula) => {
      const line = formula.closest("p, li, dt, dd, figcaption, h1, h2, h3, h4, div");
      const drawn = formula.querySelector("svg");
      return drawn && line && drawn.getBoundingClientRect().width > line.clientWidth;
    });
    wide.forEach((formula) => formula.classList.add("wide"));
    for (const box of document.querySelectorAll(boxes)) {
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
      fade(box);
    }
  }

  let asked = 0;
  const soon = () => {
    cancelAnimationFrame(asked);
    asked = requestAnimationFrame(fit);
  };
  window.addEventListener("load", async () => {
    await window.MathJax?.startup?.promise;
    fit();
    new ResizeObserver(soon).observe(document.querySelector("article") ?? document.body); // a window resized, a solution opened
    document.addEventListener("scroll", (event) => event.target.matches?.(boxes) && fade(event.target), true);
  });
})();

// The title of a solution opens it, wherever one clicks. Its words are a link to the exercise above, which would lead away
// instead, and on a formula the theme's own handler finds no button.
(() => {
  const prepare = () => {
    for (const link of document.querySelectorAll(".solution > .admonition-title > a")) link.replaceWith(...link.childNodes);
  };
  document.addEventListener(
    "click",
    (event) => {
      const title = event.target.closest?.(".toggle > .admonition-title");
      if (!title || title === event.target || event.target.closest("button")) return;
      event.stopPropagation();
      title.click();
    },
    true,
  );
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", prepare);
  else prepare();
})();
