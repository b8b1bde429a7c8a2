const series=[...document.querySelectorAll('.series')],hidden=new Set();
document.querySelectorAll('.key').forEach(key=>{
 const name=key.dataset.policy,mine=series.filter(line=>line.dataset.policy===name);
 const pick=on=>{document.body.classList.toggle('picked',on&&!hidden.has(name));
  mine.forEach(line=>line.classList.toggle('on',on));};
 key.onmouseenter=key.onfocus=()=>pick(true);key.onmouseleave=key.onblur=()=>pick(false);
 key.onclick=()=>{hidden.has(name)?hidden.delete(name):hidden.add(name);
  key.setAttribute('aria-pressed',!hidden.has(name));
  mine.forEach(line=>line.classList.toggle('off',hidden.has(name)));pick(!hidden.has(name));};
});
