// Seeking by the timeline and its playhead, and live sessions. Listeners are on the document: Gradio replaces elements.
(() => {
  const findPlayer = () => document.querySelector("#player video") || document.querySelector("#sound audio");

  document.addEventListener("click", (event) => {
    const cell = event.target.closest("[data-seek]"), player = findPlayer();
    if (cell && player) { player.currentTime = Number(cell.dataset.seek); movePlayhead(player); }
  });

  function movePlayhead(player) {
    const line = document.querySelector(".mirasol .timeline"), head = line && line.querySelector(".playhead");
    const first = line && line.querySelector(".cell");
    if (!head || !first) return;
    const begin = first.offsetLeft, width = line.clientWidth - begin - 4;
    head.style.display = "block";
    head.style.left = `${begin + width * Math.min(1, player.currentTime / Number(line.dataset.seconds))}px`;
  }
  for (const name of ["timeupdate", "seeked"]) {
    document.addEventListener(name, (event) => { if (event.target === findPlayer()) movePlayhead(event.target); }, true);
  }

  let session = null;
  const show = (name, text) => { const place = document.getElementById(`live-${name}`); if (place) place.textContent = text; };
  const setRunning = (running) => {
    document.getElementById("live-start").disabled = running;
    document.getElementById("live-stop").disabled = document.getElementById("live-ask").disabled = !running;
  };

  const told = {
    "session.created": () => show("status", "connected"),
    "chunk.encoded": (event) => {
      session.chunks += 1;
      if (event.missing === "dropped") session.dropped += 1;
      show("chunks", session.chunks);
      show("dropped", session.dropped);
      show("memory", `${(event.state_bytes / 2 ** 20).toFixed(1)} MiB`);
      show("latency", `${(1000 * event.seconds).toFixed(0)} ms`);
    },
    "answer.delta": (event) => { session.text += event.text; show("answer", session.text); },
    "answer.done": (event) => {
      session.text = "";
      show("answer", `${event.answer} (${(100 * event.probability).toFixed(0)} %)`);
      show("first", `${(1000 * event.first_token_seconds).toFixed(0)} ms`);
    },
    "note": (event) => show("status", event.message),
    "error": (event) => show("status", event.error.message),
    "session.closed": (event) => show("status", `ended: ${event.reason}`),
  };

  async function start() {
    let stream;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: true, audio: true });
    } catch (error) {
      show("status", `camera or microphone cannot be used: ${error.message}`);
      return;
    }
    const socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/v1/realtime?drop=true`);
    const recorder = new MediaRecorder(stream, { mimeType: "video/webm;codecs=vp8,opus", videoBitsPerSecond: 1000000 });
    session = { socket, recorder, stream, chunks: 0, dropped: 0, text: "" };
    show("dropped", 0);
    document.getElementById("live-view").srcObject = stream;
    recorder.ondataavailable = (event) => {
      if (event.data.size && socket.readyState === WebSocket.OPEN) socket.send(event.data);
      show("waiting", `${(socket.bufferedAmount / 1024).toFixed(0)} KiB`);
    };
    socket.onopen = () => { recorder.start(250); setRunning(true); };
    // What still arrives after a stop is not shown.
    const isCurrent = () => session !== null && session.socket === socket;
    socket.onmessage = (event) => {
      const value = JSON.parse(event.data);
      if (isCurrent() && told[value.type]) told[value.type](value);
    };
    socket.onclose = () => { if (isCurrent()) end(); };
    socket.onerror = () => show("status", "the server refused a live session: perhaps too many are open");
  }

  function end() {
    if (!session) return;
    if (session.recorder.state !== "inactive") session.recorder.stop();
    session.stream.getTracks().forEach((track) => track.stop());
    if (session.socket.readyState === WebSocket.OPEN) session.socket.send(JSON.stringify({ type: "session.close" }));
    session = null;
    setRunning(false);
  }

  document.addEventListener("click", (event) => {
    if (event.target.id === "live-start") start();
    if (event.target.id === "live-stop") { end(); show("status", "stopped"); }
  });
  document.addEventListener("submit", (event) => {
    if (event.target.id !== "live-form") return;
    event.preventDefault();
    const question = document.getElementById("live-question").value.trim();
    if (!question || !session) return;
    session.text = "";
    show("answer", "…");
    session.socket.send(JSON.stringify({ type: "question.ask", id: "live", question }));
  });
})();
