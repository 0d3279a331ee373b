// Exchanges a token, or the code in the link that a start prints, for a cookie that no script can read.
"use strict";

async function logIn(secret) {
  const answer = byId("answer");
  answer.textContent = "";
  if (!/^[!-~]+$/.test(secret)) {
    answer.textContent = word("refused"); // no header can carry it
    return;
  }
  try {
    const response = await fetch("/session", {
      method: "POST",
      headers: { Authorization: "Bearer " + secret },
    });
    if (response.ok) {
      localStorage.setItem("fedmoe-logged-in", "yes");
      location.replace("/");
      return;
    }
    const problem = await response.json();
    answer.textContent = problem.detail || word("refused");
  } catch {
    answer.textContent = word("away");
  }
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  logIn(byId("token").value.trim());
});

languageButton(() => {});
translate();
if (location.search === "?ended") byId("answer").textContent = word("ended");
if (location.hash.length > 1) {
  const code = location.hash.slice(1);
  history.replaceState(null, "", "/login"); // the code stays in no history
  logIn(code);
}
