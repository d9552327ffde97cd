'use strict' // The explorer's pages come from the server whole; this takes parts of them without loading the page, and sends photos
const $ = (s, o=document) => o.querySelector(s), $$ = (s, o=document) => [...o.querySelectorAll(s)]
const inits = [] // what other scripts do with a part that has come
if (location.search.includes('token=')) { // it is in a cookie now, and need not stand in the history
  const u = new URL(location); u.searchParams.delete('token'); history.replaceState(null, '', u)
}

let toasting
const say = text => {
  const o = $('#toast'); o.textContent = text; o.classList.add('shown')
  clearTimeout(toasting); toasting = setTimeout(() => o.classList.remove('shown'), 5000)
}
const busy = on => document.body.classList.toggle('busy', on)
const ask = async (url, options) => { // the answer, or null after its sentence was shown
  busy(true)
  try {
    const r = await fetch(url, options)
    if (r.ok) return r
    say(await r.text())
  } catch (e) { if (e.name!=='AbortError') say('The explorer does not answer: was it stopped?') } finally { busy(false) }
  return null
}
const post = async (url, body) => { const r = await ask(url, {method:'POST', body}); return r && r.json() }

// parts of pages
let last
const swap = async (url, into='#main', push=true) => {
  if (last) last.abort()
  last = new AbortController()
  const r = await ask(url, {signal:last.signal})
  if (!r) return
  const doc = new DOMParser().parseFromString(await r.text(), 'text/html')
  let from = $(into, doc), to = $(into)
  if (!from || !to || $('#main', doc).dataset.view!==$('#main').dataset.view) { from = $('#main', doc); to = $('#main') }
  const id = document.activeElement && document.activeElement.id
  const fresh = document.importNode(from, true)
  to.replaceWith(fresh)
  $('.count').replaceWith(document.importNode($('.count', doc), true))
  document.title = doc.title
  if (push) { history.pushState(null, '', url); if (into==='#main') scrollTo(0, 0) }
  if (id && $('#'+CSS.escape(id))) $('#'+CSS.escape(id)).focus()
  inits.forEach(f => f(fresh))
}
addEventListener('popstate', () => swap(location.href, '#main', false))
addEventListener('DOMContentLoaded', () => inits.forEach(f => f(document)))

const formUrl = f => f.getAttribute('action')+'?'+new URLSearchParams([...new FormData(f)].filter(([, v]) => v!==''))
let typing
addEventListener('click', e => {
  const a = e.target.closest('a[data-swap]')
  if (a && !e.ctrlKey && !e.metaKey && !e.shiftKey && e.button===0) { e.preventDefault(); swap(a.href, a.dataset.swap) }
  const z = e.target.closest('[data-zoom]')
  if (z) zoom(z)
  const c = e.target.closest('[data-choose]')
  if (c) $('#'+c.dataset.choose).click()
  if (e.target.id==='zoom' || e.target.id==='zoomed') $('#zoom').close()
  const r = e.target.closest('[data-remove]')
  if (r) remove(r)
})
addEventListener('submit', async e => {
  const f = e.target
  if (f.matches('[data-swap]')) { e.preventDefault(); clearTimeout(typing); swap(formUrl(f), f.dataset.swap) }
  if (f.matches('[data-add]')) e.preventDefault()
  if (f.matches('[data-post]')) {
    e.preventDefault()
    const res = await post(f.dataset.post, JSON.stringify(Object.fromEntries(new FormData(f))))
    if (res) swap(res.to)
  }
})
addEventListener('input', e => {
  const f = e.target.form
  if (e.target.type==='range' && e.target.nextElementSibling?.tagName==='OUTPUT') e.target.nextElementSibling.value = e.target.value
  if (f && f.matches('[data-swap]') && e.target.type==='search') { clearTimeout(typing); typing = setTimeout(() => swap(formUrl(f), f.dataset.swap), 300) }
})
addEventListener('change', e => {
  const f = e.target.form
  if (f && f.matches('[data-swap]') && e.target.type!=='search') swap(formUrl(f), f.dataset.swap)
  if (e.target.id==='photo') look(e.target.files)
  if (e.target.id==='photos') add(e.target.form, e.target.files)
  if (e.target.closest('.pick')) { const b = $('[data-remove=selected]'); if (b) b.disabled = !$('.pick :checked') }
})

// photos
const small = file => {
  if (file.size<=Number(document.body.dataset.max)) return true
  say(`“${file.name}” has ${(file.size/2**20).toFixed(0)} MiB, and ${document.body.dataset.max/2**20} MiB are taken at most.`)
  return false
}
const look = async files => {
  const file = [...files].find(o => o.type.startsWith('image/')) || files[0]
  if (!file || !small(file)) return
  const res = await post('/look', file)
  if (!res) return
  const f = $('.controls'), given = new URLSearchParams(f ? [...new FormData(f)].filter(([k, v]) => v!=='' && k!=='q') : [])
  given.set('q', res.q)
  swap('/?'+given)
}
const add = async (form, files) => {
  const label = form.elements.label.value.trim(), bar = $('progress', form)
  if (!label) { say('Give the class a name first.'); form.elements.label.focus(); return }
  let n = 0, done = 0
  bar.hidden = false; bar.value = 0
  for (const file of files) {
    if (small(file) && await post(form.dataset.add+'?'+new URLSearchParams({label}), file)) n++
    bar.value = ++done/files.length
  }
  bar.hidden = true
  if (n) { await swap('/gallery?'+new URLSearchParams({label})); if (n===files.length) say(`${n} photo${n===1 ? '' : 's'} added.`) }
}
const take = files => { const f = $('[data-add]'); if (files.length) { if (f) add(f, files); else look(files) } }
addEventListener('paste', e => take([...e.clipboardData.files]))
addEventListener('dragover', e => { if ([...e.dataTransfer.types].includes('Files')) { e.preventDefault(); document.body.classList.add('dragging') } })
addEventListener('dragleave', e => { if (!e.relatedTarget) document.body.classList.remove('dragging') })
addEventListener('drop', e => { e.preventDefault(); document.body.classList.remove('dragging'); take([...e.dataTransfer.files]) })
const zoom = o => {
  $('#zoomed').src = `/image/${o.dataset.zoom}?side=1600`; $('#zoomed').alt = o.dataset.name; $('#zoomname').textContent = o.dataset.name
  $('#zoom').showModal()
}
const remove = async b => {
  const all = b.dataset.remove==='all', numbers = $$('.pick :checked').map(o => Number(o.value))
  const n = all ? Number(b.dataset.count) : numbers.length
  $('#sureof').textContent = `Remove ${n} photo${n===1 ? '' : 's'}${all ? ` and the class “${b.dataset.label}”` : ''} from the gallery?`
  $('#sure').showModal()
  $('#sureno').onclick = () => $('#sure').close()
  $('#sureyes').onclick = async () => {
    $('#sure').close()
    const res = await post('/change/remove', JSON.stringify(all ? {label:b.dataset.label} : {numbers}))
    if (!res) return
    await swap(all ? '/gallery' : location.href)
    say(`${res.removed} photo${res.removed===1 ? '' : 's'} removed.`)
  }
}

// keys
addEventListener('keydown', e => {
  const typed = e.target.closest('input:not([type=range], [type=checkbox], [type=file]), select, textarea')
  if (e.key==='Escape' && typed) { typed.blur(); return }
  if (typed || e.ctrlKey || e.metaKey || e.altKey || $('dialog[open]')) return
  if (e.key==='/' && $('input[type=search]')) { e.preventDefault(); $('input[type=search]').focus() }
  const tab = $(`nav [data-key="${CSS.escape(e.key)}"]`)
  if (tab) tab.click()
  const cards = $$('.card > a, .class'), i = cards.indexOf(document.activeElement)
  if (e.key===' ' && i>=0) { const z = $('.zoom', cards[i].parentElement); if (z) { e.preventDefault(); zoom(z) } }
  if (!e.key.startsWith('Arrow') || !cards.length || e.target.type==='range') return
  const top = o => o.getBoundingClientRect().top
  const wide = Math.max(1, cards.findIndex(o => top(o)>top(cards[0])+4)<0 ? cards.length : cards.findIndex(o => top(o)>top(cards[0])+4))
  const to = i<0 ? 0 : i+{ArrowLeft:-1, ArrowRight:1, ArrowUp:-wide, ArrowDown:wide}[e.key]
  if (cards[to]) { e.preventDefault(); cards[to].focus({preventScroll:true}); cards[to].scrollIntoView({block:'nearest'}) }
})

// what is computed first
inits.push(root => $$('[data-load]', root).forEach(o => swap(o.dataset.load, '#main', false)))

// what a threshold means
const svg = (name, attrs, text) => {
  const o = document.createElementNS('http://www.w3.org/2000/svg', name)
  for (const [k, v] of Object.entries(attrs)) o.setAttribute(k, v)
  if (text!==undefined) o.textContent = text
  return o
}
const pct = x => `${+(100*x).toPrecision(x>=.995 ? 3 : 2)} %`
const count = n => n.toLocaleString('en')
const oneIn = (n, of) => n===0 ? 'none' : n===of ? 'all' : 2*n>of ? `${(100*n/of).toFixed(0)} of 100` : `1 in ${count(Math.round(of/n))}`
inits.push(async root => {
  const box = $('#threshold', root)
  if (!box) return
  const r = await fetch(box.dataset.url)
  if (!r.ok) { box.replaceChildren(Object.assign(document.createElement('p'), {className:'because', textContent:await r.text()})); return }
  const d = await r.json(), slider = $('#cutter'), own = Number(box.dataset.calibrated || NaN)
  const nearest = t => d.threshold.reduce((best, v, i) => Math.abs(v-t)<Math.abs(d.threshold[best]-t) ? i : best, 0)
  // the curve: false matches on a logarithmic axis
  const [L, R, T, B] = [46, 398, 10, 256], low = Math.max(Math.floor(Math.log10(Math.min(.1, ...d.fmr.filter(o => o>0))+1e-12)), -5)
  const X = f => L+(R-L)*(Math.log10(Math.max(f, 10**low))-low)/-low, Y = t => B-(B-T)*t
  const roc = $('#roc')
  for (let e=low; e<=0; e++) roc.append(svg('line', {x1:X(10**e), x2:X(10**e), y1:T, y2:B, class:'axis'}),
    svg('text', {x:X(10**e), y:B+18, 'text-anchor':'middle'}, pct(10**e)))
  for (const t of [0, .25, .5, .75, 1]) roc.append(svg('line', {x1:L, x2:R, y1:Y(t), y2:Y(t), class:'axis'}), svg('text', {x:L-8, y:Y(t)+4, 'text-anchor':'end'}, pct(t)))
  roc.append(svg('text', {x:R, y:B+36, 'text-anchor':'end'}, 'false matches: share of the pairs of two classes that count as one'),
    svg('text', {x:L, y:T+14, dx:6}, 'share of the pairs of one class that are found'))
  const points = d.fmr.map((f, i) => [f, d.tmr[i]]).sort((a, b) => a[0]-b[0] || a[1]-b[1])
  roc.append(svg('polyline', {points:points.map(([f, t]) => `${X(f).toFixed(1)},${Y(t).toFixed(1)}`).join(' '), class:'curve'}))
  const dot = svg('circle', {r:6, class:'dot'})
  roc.append(dot)
  // both errors over the thresholds, below the slider
  const both = $('#both'), w = d.threshold.length-1
  const area = (a, n, cls) => both.append(svg('polygon', {points:`0,100 ${a.map((v, i) => `${i},${(100-100*v/n).toFixed(2)}`).join(' ')} ${w},100`, class:cls}))
  both.setAttribute('viewBox', `0 0 ${w} 100`)
  area(d.missed, d.n_genuine, 'missed'); area(d.false, d.n_impostor, 'false')
  const mark = svg('line', {y1:0, y2:100, class:'mark', 'vector-effect':'non-scaling-stroke'})
  both.append(mark)
  $('#lowest').textContent = d.threshold[0].toFixed(2); $('#highest').textContent = d.threshold[w].toFixed(2)
  // the slider
  slider.max = d.threshold.length-1
  const show = () => {
    const i = Number(slider.value), f = d.false[i], m = d.missed[i]
    $('#cut').value = d.threshold[i].toFixed(3)
    slider.setAttribute('aria-valuetext', d.threshold[i].toFixed(3))
    $('#falsesaid').textContent = `${oneIn(f, d.n_impostor)} pairs of two classes would count as one`.replace('none pairs', 'No pairs').replace('all pairs', 'All pairs')
    $('#falsecount').textContent = `${count(f)} of ${count(d.n_impostor)} · ${pct(f/d.n_impostor)}`
    $('#missedsaid').textContent = `${pct(m/d.n_genuine)} of the pairs of one class would be missed`
    $('#missedcount').textContent = `${count(m)} of ${count(d.n_genuine)}`
    mark.setAttribute('x1', i); mark.setAttribute('x2', i)
    dot.setAttribute('cx', X(f/d.n_impostor)); dot.setAttribute('cy', Y(1-m/d.n_genuine))
    for (const b of $$('#rates button')) b.setAttribute('aria-pressed', b.dataset.at===String(i))
  }
  const go = t => { slider.value = nearest(t); show() }
  const rate = (text, t, title) => { const b = Object.assign(document.createElement('button'), {type:'button', textContent:text, title, className:'quiet'})
    b.dataset.at = nearest(t); b.onclick = () => go(t); $('#rates').append(b) }
  if (!isNaN(own)) rate('calibrated', own, 'The threshold that this embedder brings')
  for (const o of d.rates) rate(`false matches ${pct(o.fmr)}`, o.threshold, 'The threshold at which this share of the pairs of two classes counts as one')
  $('#allsaid').textContent = `${count(d.items)} items compared with each other. Area under the curve ${d.auc.toFixed(3)}, equal error rate ${pct(d.eer)}.`
  $('#allsaid').title = 'Area under the curve: how often a pair of one class scores higher than a pair of two. Equal error rate: where both errors are as frequent.'
  slider.oninput = show
  go(isNaN(own) ? d.rates[0].threshold : own)
})

// labels, one by one
const decide = async kind => {
  const f = $('#deciding')
  if (kind!=='undo' && !f) return
  const body = {decision:kind}
  if (kind!=='undo') body.n = Number(f.dataset.item)
  if (kind==='other') { body.other = $('#other').value.trim(); if (!body.other) { $('#other').focus(); return say('Name the other class first.') } }
  if (await post('/change/decide', JSON.stringify(body))) swap('/labels', '#main', false)
}
addEventListener('click', e => { const b = e.target.closest('[data-decide]'); if (b) decide(b.dataset.decide) })
addEventListener('submit', e => { if (e.target.id==='deciding') { e.preventDefault(); decide('other') } })
addEventListener('keydown', e => {
  if (e.target.closest('input, select, textarea') || e.ctrlKey || e.metaKey || e.altKey) return
  const b = $$('[data-decide]').find(o => $('kbd', o).textContent===e.key)
  if (b && !b.disabled) { e.preventDefault(); b.dataset.decide==='other' ? $('#other').focus() : decide(b.dataset.decide) }
})

// the map
inits.push(async root => {
  const box = $('#map', root)
  if (!box) return
  const show = d => {
    const at = new Map(d.numbers.map((n, i) => [n, i])), calibrated = d.threshold
    dmlMap(box, d, {threshold:calibrated, thumb:i => `/image/${d.numbers[i]}?side=320`, openText:'Search with this photo',
      open:i => { location.href = `/?q=${d.numbers[i]}` },
      near:async i => {
        const r = await ask(`/near/${d.numbers[i]}?k=12`)
        return r ? (await r.json()).near.filter(o => at.has(o[0])).map(([n, s]) => [at.get(n), s]) : []
      }})
  }
  if (box.dataset.big) { // the first picture at once
    const r = await ask(box.dataset.url+'?quick=1')
    if (!r) return
    const d = await r.json()
    show(d)
    if (!d.quick) return
  }
  const note = Object.assign(document.createElement('div'), {className:'busymap', textContent:'Arranging the photos …'})
  if (box.dataset.big) document.body.append(note)
  const r = await ask(box.dataset.url)
  note.remove()
  if (r) show(await r.json())
})
